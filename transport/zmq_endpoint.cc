#include "transport/zmq_endpoint.h"

#include <utility>

namespace kvrelay::transport {
namespace {

constexpr int kEvents = ZMQ_EVENT_CONNECT_RETRIED | ZMQ_EVENT_DISCONNECTED |
                        ZMQ_EVENT_HANDSHAKE_FAILED_AUTH | ZMQ_EVENT_HANDSHAKE_FAILED_PROTOCOL |
                        ZMQ_EVENT_HANDSHAKE_FAILED_NO_DETAIL;

// On ZeroMQ's I/O thread, or inside zmq_msg_close.
void OnFree(void*, void* hint) {
  std::unique_ptr<ZmqSend> send(static_cast<ZmqSend*>(hint));
  ZmqFreed& freed = *send->freed;
  (void)freed.Push(std::move(send));  // it has no bound
}

}  // namespace

Result<std::unique_ptr<ZmqEndpoint>> ZmqEndpoint::Create(std::shared_ptr<ZmqContext> context,
                                                         const ZmqSocketOptions& options,
                                                         const CurveIdentity& identity,
                                                         const KeyedEndpoint& peer, EventLoop& loop,
                                                         ZmqFreed& freed) {
  KVRELAY_ASSIGN_OR_RETURN(ZmqSocket socket, ZmqSocket::Create(context, ZMQ_PUSH, options));
  KVRELAY_RETURN_IF_ERROR(socket.BeCurveClient(identity, *peer.key));
  KVRELAY_ASSIGN_OR_RETURN(ZmqMonitor monitor,
                           ZmqMonitor::Create(std::move(context), socket, kEvents));
  KVRELAY_RETURN_IF_ERROR(socket.Connect(peer.endpoint));
  std::unique_ptr<ZmqEndpoint> endpoint(
      new ZmqEndpoint(std::move(socket), std::move(monitor), loop, freed));
  ZmqEndpoint* self = endpoint.get();
  KVRELAY_RETURN_IF_ERROR(
      loop.Watch(self->monitor_->fd(), EPOLLIN, [self](uint32_t) { self->OnEvents(); }));
  self->OnEvents();  // what came before the watch
  return endpoint;
}

void ZmqEndpoint::Send(std::span<const std::byte> header, std::span<const std::byte> data,
                       Sent sent) {
  int rc;
  do {
    rc = zmq_send(socket_->get(), header.data(), header.size(), ZMQ_SNDMORE | ZMQ_DONTWAIT);
  } while (rc < 0 && zmq_errno() == EINTR);
  // Only a message's first frame can fail: it decides about the whole message.
  if (rc < 0) return sent(Status(Code::kPeerUnreachable, "ZeroMQ takes no more messages"));
  auto send = std::make_unique<ZmqSend>(ZmqSend{&freed_, this, std::move(sent)});
  ++in_flight_;
  zmq_msg_t message;
  zmq_msg_init_data(&message, const_cast<std::byte*>(data.data()), data.size(), &OnFree,
                    send.release());
  do {
    rc = zmq_msg_send(&message, socket_->get(), ZMQ_DONTWAIT);
  } while (rc < 0 && zmq_errno() == EINTR);
  if (rc < 0) {
    failure_ = Status(Code::kPeerUnreachable, "ZeroMQ takes no more messages");
    zmq_msg_close(&message);
  }
}

void ZmqEndpoint::OnFreed(ZmqSend& send) {
  --in_flight_;
  send.sent(failure_);
}

void ZmqEndpoint::Close() {
  if (closing()) return;
  loop_.Unwatch(monitor_->fd());
  monitor_.reset();
  socket_.reset();
}

void ZmqEndpoint::OnEvents() {
  while (const auto event = monitor_->Receive()) {
    if (!failure_.ok()) continue;
    switch (event->what) {
      case ZMQ_EVENT_CONNECT_RETRIED:
        failure_ = Status(Code::kPeerUnreachable, "nobody answers at the peer's data port");
        break;
      case ZMQ_EVENT_HANDSHAKE_FAILED_AUTH:
        failure_ = Status(Code::kRefused, "the peer does not allow our key");
        break;
      case ZMQ_EVENT_HANDSHAKE_FAILED_PROTOCOL:
      case ZMQ_EVENT_HANDSHAKE_FAILED_NO_DETAIL:
        failure_ = Status(Code::kRefused, "the peer's data port does not have the key it told us");
        break;
      default:
        failure_ = Status(Code::kPeerUnreachable, "the connection to the peer's data port broke");
    }
  }
}

}  // namespace kvrelay::transport
