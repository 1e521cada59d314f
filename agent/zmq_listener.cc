#include "agent/zmq_listener.h"

#include <glog/logging.h>
#include <zmq.h>

#include <utility>
#include <vector>

#include "proto/codec.h"
#include "proto/limits.h"

namespace kvrelay::agent {
namespace {

constexpr int kListenerEvents = ZMQ_EVENT_ACCEPTED | ZMQ_EVENT_DISCONNECTED |
                                ZMQ_EVENT_HANDSHAKE_FAILED_NO_DETAIL |
                                ZMQ_EVENT_HANDSHAKE_FAILED_PROTOCOL;

std::string BadMessages(std::string_view reason) {
  return "kvrelay_bad_messages_total{reason=\"" + std::string(reason) + "\"}";
}

// `reason`: the monitor's. Where one side has keys and the other none, which of them ends the
// handshake first is chance, and so is what we hear.
std::string_view WhatIsWrong(int reason, bool with_keys) {
  if (reason == ZMQ_PROTOCOL_ERROR_ZMTP_CRYPTOGRAPHIC) return "expects another key here";
  return with_keys ? "has no key, or does not speak ZeroMQ"
                   : "does not speak ZeroMQ, or asks for a key";
}

}  // namespace

class ZmqListener::Request final : public Responder {
 public:
  Request(std::weak_ptr<ZmqListener> listener, RequestKey key, int connection, proto::Type type)
      : listener_(std::move(listener)),
        key_(std::move(key)),
        connection_(connection),
        type_(type) {}

  ~Request() override {
    if (open_) {
      Fail({Code::kInternal,
            std::string(proto::TypeName(type_)) + " was dropped without an answer"});
    }
  }

  void Reply(std::string body, bool more) override {
    const auto listener = listener_.lock();
    if (!open_ || listener == nullptr) return;
    if (body.size() > proto::kMaxBodyBytes) {
      return Fail({Code::kTooLarge, "the answer to " + std::string(proto::TypeName(type_)) +
                                        " has " + std::to_string(body.size()) +
                                        " bytes, more than " +
                                        std::to_string(proto::kMaxBodyBytes)});
    }
    if (!more) Close(*listener);
    const proto::Envelope envelope{proto::Type::kOk, key_.second, more, 0, body};
    if (listener->Send(key_.first, envelope) != Sent::kYes) OnSendFailed(*listener);
  }

  void Fail(const Status& status) override {
    const auto listener = listener_.lock();
    if (!open_ || listener == nullptr) return;
    Close(*listener);
    if (listener->SendError(key_.first, key_.second, status) != Sent::kYes) OnSendFailed(*listener);
  }

  bool cancelled() const override { return cancelled_; }

  void OnCancel(std::function<void()> fn) override {
    if (open_) {
      std::swap(on_cancel_, fn);
    } else if (const auto listener = listener_.lock(); cancelled_ && listener != nullptr) {
      RunSoon(*listener, std::move(fn));
    }
  }

  // By the listener: the caller is gone. Returns what is to be run, outside of this object.
  std::function<void()> Cancel(ZmqListener& listener) {
    cancelled_ = true;
    auto fn = TakeOnCancel();
    Close(listener);
    return fn;
  }
  std::function<void()> TakeOnCancel() { return std::exchange(on_cancel_, nullptr); }

  const RequestKey& key() const { return key_; }
  int connection() const { return connection_; }
  Clock::TimerId deadline = 0;  // the caller's

 private:
  void Close(ZmqListener& listener) {
    open_ = false;
    listener.Forget(*this);
    const auto never_run = TakeOnCancel();  // may hold us: the caller of a public function does too
  }

  // A caller that left, or that does not read what it asked for. After the final answer nobody has
  // to know.
  void OnSendFailed(ZmqListener& listener) {
    if (!open_) return;
    if (auto fn = Cancel(listener); fn != nullptr) RunSoon(listener, std::move(fn));
  }

  void RunSoon(ZmqListener& listener, std::function<void()> fn) {
    listener.loop_.CallAfter(Duration::zero(), [alive = listener_, fn = std::move(fn)] {
      if (!alive.expired()) fn();
    });
  }

  const std::weak_ptr<ZmqListener> listener_;
  const RequestKey key_;
  const int connection_;
  const proto::Type type_;
  bool open_ = true;  // known to the listener
  bool cancelled_ = false;
  std::function<void()> on_cancel_;
};

Result<std::shared_ptr<ZmqListener>> ZmqListener::Create(
    std::shared_ptr<transport::ZmqContext> context, EventLoop& loop, Counters& counters,
    const std::string& endpoint, const transport::ZmqSocketOptions& options,
    std::shared_ptr<const transport::CurveIdentity> curve) {
  KVRELAY_ASSIGN_OR_RETURN(transport::ZmqSocket socket,
                           transport::ZmqSocket::Create(context, ZMQ_ROUTER, options));
  KVRELAY_ASSIGN_OR_RETURN(transport::ZmqMonitor monitor,
                           transport::ZmqMonitor::Create(context, socket, kListenerEvents));
  transport::KeyedEndpoint at;
  std::optional<transport::ZapHandler> zap;
  if (curve != nullptr) {
    at.key = curve->public_key;
    KVRELAY_RETURN_IF_ERROR(socket.BeCurveServer(*curve));
    KVRELAY_ASSIGN_OR_RETURN(zap, transport::ZapHandler::Create(context, std::move(curve)));
  }
  KVRELAY_ASSIGN_OR_RETURN(at.endpoint, socket.Bind(endpoint));
  std::shared_ptr<ZmqListener> listener(new ZmqListener(
      loop, counters, std::move(socket), std::move(monitor), at.ToText(), std::move(zap)));
  listener->StartWatching();
  return listener;
}

ZmqListener::ZmqListener(EventLoop& loop, Counters& counters, transport::ZmqSocket socket,
                         transport::ZmqMonitor monitor, std::string endpoint,
                         std::optional<transport::ZapHandler> zap)
    : loop_(loop),
      counters_(counters),
      socket_(std::move(socket)),
      monitor_(std::move(monitor)),
      zap_(std::move(zap)),
      endpoint_(std::move(endpoint)) {}

void ZmqListener::StartWatching() {
  socket_watch_ = loop_.WatchSocket(socket_.get(), [this] { OnReadable(); });
  monitor_watch_ = loop_.WatchSocket(monitor_.get(), [this] { OnConnectionEvents(); });
  if (zap_.has_value()) {
    zap_watch_ = loop_.WatchSocket(zap_->socket().get(), [this] { ServeZap(); });
  }
}

ZmqListener::~ZmqListener() {
  loop_.Unwatch(socket_watch_);
  loop_.Unwatch(monitor_watch_);
  loop_.Unwatch(zap_watch_);
  // Let go of after the loop: such a function may hold its request, and others.
  std::vector<std::function<void()>> never_run;
  for (const auto& [key, request] : requests_) {
    loop_.Cancel(request->deadline);
    never_run.push_back(request->TakeOnCancel());
  }
}

void ZmqListener::ServeZap() {
  for (size_t refused = zap_->Serve(); refused > 0; --refused) counters_.Add(BadMessages("key"));
}

void ZmqListener::Handle(proto::Type type, Rpc::Handler handler) {
  handlers_[static_cast<size_t>(type)] = std::move(handler);
}

void ZmqListener::OnReadable() {
  for (int i = 0; i < EventLoop::kMessagesPerRound; ++i) {
    const std::optional<transport::ZmqMessage> message = socket_.Receive();
    if (!message) return;
    // Descriptors are used again. The events that were there before this message tell whose its
    // descriptor is; without them a late "closed" for the connection before it would cancel this
    // one's request.
    OnConnectionEvents();
    OnMessage(*message);
  }
}

void ZmqListener::OnConnectionEvents() {
  while (const std::optional<transport::ZmqMonitor::Event> event = monitor_.Receive()) {
    if (event->what == ZMQ_EVENT_ACCEPTED) {
      connections_[event->value];
    } else if (event->what == ZMQ_EVENT_DISCONNECTED) {
      auto closed = connections_.extract(event->value);
      if (closed.empty()) continue;
      // By key: what runs on one's cancelling may end others.
      std::vector<RequestKey> keys;
      for (const Request* request : closed.mapped()) keys.push_back(request->key());
      for (const RequestKey& key : keys) CancelRequest(key);
    } else {
      counters_.Add(BadMessages("handshake"));
      LOG_EVERY_T(WARNING, 1) << endpoint_ << ": refused a connection that "
                              << WhatIsWrong(event->value, zap_.has_value());
    }
  }
}

void ZmqListener::OnMessage(const transport::ZmqMessage& message) {
  if (message.frame_count != 3 || !message.frames[1].empty()) {
    // The last frame that we have may still tell whom to answer.
    const auto envelope = proto::DecodeEnvelope(message.frames.back());
    const uint64_t id = envelope ? envelope->id : envelope.error().id;
    return Reject(message, {{Code::kInvalidArgument,
                             std::to_string(message.frame_count - 1) +
                                 " frames; a request is an empty one and an envelope"},
                            "frames",
                            id});
  }
  const auto envelope = proto::DecodeEnvelope(message.frames[2]);
  if (!envelope) return Reject(message, envelope.error());
  if (envelope->type == proto::Type::kCancelCall) {
    return CancelRequest({message.frames[0], envelope->id});
  }
  Serve(message, *envelope);
}

void ZmqListener::Serve(const transport::ZmqMessage& message, const proto::Envelope& envelope) {
  RequestKey key{message.frames[0], envelope.id};
  const Rpc::Handler& handler = handlers_[static_cast<size_t>(envelope.type)];
  if (handler == nullptr) {
    return Reject(message, {{Code::kInvalidArgument, std::string(proto::TypeName(envelope.type)) +
                                                         " is not answered at " + endpoint_},
                            "type",
                            envelope.id});
  }
  if (requests_.contains(key)) {
    // Not answered: the answer would be taken for that of the first.
    return Reject(message, {{Code::kInvalidArgument, "a call id that is in use"}, "duplicate", 0});
  }
  if (requests_.size() >= kMaxRequests) {
    SendError(key.first, key.second,
              {Code::kOverloaded,
               endpoint_ + " has " + std::to_string(kMaxRequests) + " requests in progress"});
    return;
  }
  if (message.connection >= 0 && !connections_.contains(message.connection)) return;  // gone again

  const auto request =
      std::make_shared<Request>(weak_from_this(), key, message.connection, envelope.type);
  requests_.emplace(key, request.get());
  if (message.connection >= 0) connections_[message.connection].insert(request.get());
  if (envelope.timeout_ms > 0) {
    request->deadline =
        loop_.CallAfter(Millis(envelope.timeout_ms), [this, key] { CancelRequest(key); });
  }
  handler(envelope.body, request);
}

void ZmqListener::Reject(const transport::ZmqMessage& message, const proto::BadEnvelope& bad) {
  counters_.Add(BadMessages(bad.reason));
  LOG_EVERY_T(WARNING, 1) << endpoint_ << ": bad message from "
                          << (message.peer.empty() ? "an unknown peer" : message.peer) << ": "
                          << bad.status.message();
  if (bad.id != 0) SendError(message.frames[0], bad.id, bad.status);
}

ZmqListener::Sent ZmqListener::Send(const std::string& identity, const proto::Envelope& envelope) {
  if (socket_.Send({identity, {}, proto::EncodeEnvelope(envelope)})) return Sent::kYes;
  if (zmq_errno() == EHOSTUNREACH) return Sent::kPeerGone;
  counters_.Add("kvrelay_replies_dropped_total");
  LOG_EVERY_T(WARNING, 1) << endpoint_
                          << ": a caller does not read its answers: " << zmq_strerror(zmq_errno());
  return Sent::kQueueFull;
}

ZmqListener::Sent ZmqListener::SendError(const std::string& identity, uint64_t id,
                                         const Status& status) {
  // kOk is no error on the wire; a handler that fails with it has a defect.
  const Code code = status.ok() ? Code::kInternal : status.code();
  const std::string body =
      proto::Encode(proto::Error{code, status.message().substr(0, proto::kMaxErrorText)});
  return Send(identity, {proto::Type::kError, id, false, 0, body});
}

void ZmqListener::CancelRequest(const RequestKey& key) {
  const auto it = requests_.find(key);
  if (it == requests_.end()) return;
  // The function may let go of the request's last owner: nothing of the request is touched after
  // it.
  const std::function<void()> fn = it->second->Cancel(*this);
  if (fn != nullptr) fn();
}

void ZmqListener::Forget(const Request& request) {
  loop_.Cancel(request.deadline);
  const auto connection = connections_.find(request.connection());
  if (connection != connections_.end()) {
    connection->second.erase(requests_.at(request.key()));
  }
  requests_.erase(request.key());
}

}  // namespace kvrelay::agent
