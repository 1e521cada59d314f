#include "agent/zmq_rpc.h"

#include <utility>

#include "proto/limits.h"

namespace kvrelay::agent {

Result<std::unique_ptr<ZmqRpc>> ZmqRpc::Create(EventLoop& loop, Counters& counters,
                                               Options options) {
  options.socket.max_bytes = proto::kMaxMessageBytes;
  auto context = std::make_shared<transport::ZmqContext>();
  std::shared_ptr<ZmqListener> listener;
  if (!options.listen.empty()) {
    transport::ZmqSocketOptions socket = options.socket;
    socket.linger = options.linger;
    KVRELAY_ASSIGN_OR_RETURN(listener, ZmqListener::Create(context, loop, counters, options.listen,
                                                           socket, options.curve));
  }
  return std::unique_ptr<ZmqRpc>(
      new ZmqRpc(std::move(context), loop, counters, options, std::move(listener)));
}

ZmqRpc::ZmqRpc(std::shared_ptr<transport::ZmqContext> context, EventLoop& loop, Counters& counters,
               const Options& options, std::shared_ptr<ZmqListener> listener)
    : context_(context),
      listener_(std::move(listener)),
      dialer_(std::move(context), loop, counters, options.socket, options.idle_close,
              options.curve) {}

ZmqRpc::~ZmqRpc() = default;

std::string ZmqRpc::endpoint() const {
  return listener_ == nullptr ? std::string() : listener_->endpoint();
}

void ZmqRpc::Handle(proto::Type type, Handler handler) {
  if (listener_ != nullptr) listener_->Handle(type, std::move(handler));
}

Rpc::CallId ZmqRpc::Call(const std::string& endpoint, proto::Type type, std::string body,
                         TimePoint deadline, OnReply on_reply) {
  return dialer_.Call(endpoint, type, std::move(body), deadline, std::move(on_reply));
}

void ZmqRpc::Abandon(CallId id) { dialer_.Abandon(id); }

}  // namespace kvrelay::agent
