#include "transport/zmq_carrier.h"

#include <zmq.h>

#include <optional>
#include <utility>
#include <vector>

#include "base/wake_queue.h"
#include "transport/zap_handler.h"
#include "transport/zmq_endpoint.h"
#include "transport/zmq_socket.h"

namespace kvrelay::transport {
namespace {

constexpr std::string_view kLibrary = "zmq-curve";
constexpr int kReceiveQueue = 8;      // messages of one peer that wait for us
constexpr int kSendQueue = 64;        // more than a lane ever has in flight
constexpr int kMessagesPerRound = 4;  // then the thread's other work has its turn
constexpr uint64_t kHeadroom = 4096;  // of a frame, for CURVE
constexpr std::string_view kScheme = "tcp://";

std::span<const std::byte> BytesOf(ZmqFrame& frame) {
  return std::as_bytes(std::span(frame.view()));
}

class ZmqCarrier final : public PackedCarrier {
 public:
  static Result<std::unique_ptr<PackedCarrier>> Create(
      const std::string& interface, uint64_t message_bytes,
      std::shared_ptr<const CurveIdentity> identity);
  ~ZmqCarrier() override;

  std::string_view name() const override { return "zmq-packed"; }
  std::string library() const override { return std::string(kLibrary); }
  std::string where() const override { return "address: " + address_.endpoint; }
  uint64_t max_bytes_per_peer() const override {
    // Those that wait for us, one that is read, and one that is being encrypted for the peer.
    return (kReceiveQueue + 2) * static_cast<uint64_t>(options_.max_bytes);
  }

  Result<std::string> Start(EventLoop& loop, OnMessage on_message, OnForeign on_foreign) override;
  Result<std::unique_ptr<PackedEndpoint>> Connect(const PackedAddress& peer) override;
  bool Progress() override;
  bool PrepareToSleep() override;

 private:
  ZmqCarrier() = default;
  Status Open(const std::string& interface);
  bool ReceiveOne();
  void ServeZap() {
    for (size_t refused = zap_->Serve(); refused > 0; --refused) on_foreign_();
  }

  std::shared_ptr<const CurveIdentity> identity_;
  ZmqSocketOptions options_;
  KeyedEndpoint address_;
  // Before the context: it frees what it still has when it ends.
  ZmqFreed freed_{SIZE_MAX};
  std::vector<std::unique_ptr<ZmqSend>> batch_;
  std::shared_ptr<ZmqContext> context_;
  std::optional<ZapHandler> zap_;
  std::optional<ZmqSocket> inbox_;
  EventLoop* loop_ = nullptr;
  OnMessage on_message_;
  OnForeign on_foreign_;
};

Result<std::unique_ptr<PackedCarrier>> ZmqCarrier::Create(
    const std::string& interface, uint64_t message_bytes,
    std::shared_ptr<const CurveIdentity> identity) {
  if (zmq_has("curve") == 0) {
    return Error(Code::kIncompatible, "this libzmq was built without CURVE");
  }
  std::unique_ptr<ZmqCarrier> carrier(new ZmqCarrier);
  if (identity == nullptr) {
    CurveIdentity own = NewCurveIdentity();
    own.anybody = true;
    identity = std::make_shared<const CurveIdentity>(std::move(own));
  }
  carrier->identity_ = std::move(identity);
  carrier->options_.queue_messages = kSendQueue;
  carrier->options_.receive_queue = kReceiveQueue;
  carrier->options_.max_bytes = static_cast<int64_t>(message_bytes + kHeadroom);
  KVRELAY_RETURN_IF_ERROR(carrier->Open(interface));
  return carrier;
}

Status ZmqCarrier::Open(const std::string& interface) {
  context_ = std::make_shared<ZmqContext>();
  if (!identity_->anybody) {
    KVRELAY_ASSIGN_OR_RETURN(zap_, ZapHandler::Create(context_, identity_));
  }
  KVRELAY_ASSIGN_OR_RETURN(inbox_, ZmqSocket::Create(context_, ZMQ_PULL, options_));
  KVRELAY_RETURN_IF_ERROR(inbox_->BeCurveServer(*identity_));
  KVRELAY_ASSIGN_OR_RETURN(
      address_.endpoint,
      inbox_->Bind(std::string(kScheme) + (interface.empty() ? "lo" : interface) + ":*"));
  address_.key = identity_->public_key;
  return Status::Ok();
}

ZmqCarrier::~ZmqCarrier() {
  if (loop_ == nullptr) return;
  loop_->Unwatch(freed_.fd());
  loop_->Unwatch(inbox_->fd());
  if (zap_.has_value()) loop_->Unwatch(zap_->socket().fd());
}

Result<std::string> ZmqCarrier::Start(EventLoop& loop, OnMessage on_message, OnForeign on_foreign) {
  on_message_ = std::move(on_message);
  on_foreign_ = std::move(on_foreign);
  loop_ = &loop;
  KVRELAY_RETURN_IF_ERROR(loop.Watch(freed_.fd(), EPOLLIN, [](uint32_t) {}));
  KVRELAY_RETURN_IF_ERROR(loop.Watch(inbox_->fd(), EPOLLIN, [](uint32_t) {}));
  if (zap_.has_value()) {
    KVRELAY_RETURN_IF_ERROR(
        loop.Watch(zap_->socket().fd(), EPOLLIN, [this](uint32_t) { ServeZap(); }));
    ServeZap();  // who came before the watch
  }
  return address_.ToText();
}

Result<std::unique_ptr<PackedEndpoint>> ZmqCarrier::Connect(const PackedAddress& peer) {
  if (peer.library != kLibrary) {
    return Error(Code::kIncompatible,
                 "the peer's data port speaks " + peer.library + ", ours " + std::string(kLibrary));
  }
  KVRELAY_ASSIGN_OR_RETURN(const KeyedEndpoint at, KeyedEndpoint::FromText(peer.worker));
  // Nothing else that ZeroMQ would understand: no names, no other kinds of transport.
  if (!at.key.has_value() || !at.endpoint.starts_with(kScheme) ||
      at.endpoint.find_first_not_of("0123456789abcdefABCDEF.:[]", kScheme.size()) !=
          std::string::npos) {
    return Error(Code::kInvalidArgument, "the peer's data port is no address with a key");
  }
  if (!identity_->Allows(*at.key)) {
    return Error(Code::kRefused, "the key " + KeyToText(*at.key) +
                                     " of the peer's data port is not one that we allow");
  }
  KVRELAY_ASSIGN_OR_RETURN(std::unique_ptr<ZmqEndpoint> endpoint,
                           ZmqEndpoint::Create(context_, options_, *identity_, at, *loop_, freed_));
  return endpoint;
}

bool ZmqCarrier::Progress() {
  bool any = false;
  if (freed_.ApproximateSize() > 0) {
    freed_.DrainInto(batch_);
    for (const auto& send : batch_) send->endpoint->OnFreed(*send);
    batch_.clear();
    any = true;
  }
  for (int i = 0; i < kMessagesPerRound && ReceiveOne(); ++i) any = true;
  return any;
}

bool ZmqCarrier::ReceiveOne() {
  ZmqFrame header;
  if (!inbox_->ReceiveFrame(header)) return false;
  ZmqFrame data;
  bool more = header.more() && inbox_->ReceiveFrame(data);
  const bool good = more && !data.more();
  for (more = more && data.more(); more;) {
    ZmqFrame rest;
    more = inbox_->ReceiveFrame(rest) && rest.more();
  }
  if (good) {
    on_message_(BytesOf(header), BytesOf(data));
  } else {
    on_foreign_();
  }
  return true;
}

bool ZmqCarrier::PrepareToSleep() { return freed_.ApproximateSize() == 0 && !inbox_->HasMessage(); }

}  // namespace

Result<std::unique_ptr<PackedCarrier>> CreateZmqCarrier(
    const std::string& interface, uint64_t message_bytes,
    std::shared_ptr<const CurveIdentity> identity) {
  return ZmqCarrier::Create(interface, message_bytes, std::move(identity));
}

}  // namespace kvrelay::transport
