#include "agent/zmq_dialer.h"

#include <glog/logging.h>
#include <zmq.h>

#include <algorithm>
#include <utility>
#include <vector>

#include "proto/codec.h"
#include "proto/envelope.h"
#include "proto/limits.h"

namespace kvrelay::agent {
namespace {

constexpr int kDialerEvents = ZMQ_EVENT_CONNECTED | ZMQ_EVENT_CONNECT_RETRIED |
                              ZMQ_EVENT_DISCONNECTED | ZMQ_EVENT_HANDSHAKE_FAILED_AUTH |
                              ZMQ_EVENT_HANDSHAKE_FAILED_PROTOCOL |
                              ZMQ_EVENT_HANDSHAKE_FAILED_NO_DETAIL;

// libzmq counts whole milliseconds, by a clock of its own.
constexpr Duration kTimerSlack = Millis(5);

int64_t WholeMillis(Duration d) { return std::chrono::ceil<std::chrono::milliseconds>(d).count(); }

}  // namespace

struct ZmqDialer::Peer {
  Peer(std::string endpoint, TimePoint started, transport::ZmqSocket socket,
       transport::ZmqMonitor monitor)
      : endpoint(std::move(endpoint)),
        started(started),
        socket(std::move(socket)),
        monitor(std::move(monitor)) {}

  const std::string endpoint;
  const TimePoint started;
  transport::ZmqSocket socket;
  transport::ZmqMonitor monitor;
  EventLoop::WatchId socket_watch = 0;
  EventLoop::WatchId monitor_watch = 0;
  bool connected = false;
  bool dropped = false;  // not in peers_ any more
  Clock::TimerId idle = 0;
  std::unordered_set<Rpc::CallId> calls;  // in flight
};

ZmqDialer::ZmqDialer(std::shared_ptr<transport::ZmqContext> context, EventLoop& loop,
                     Counters& counters, transport::ZmqSocketOptions options, Duration idle_close,
                     std::shared_ptr<const transport::CurveIdentity> curve)
    : context_(std::move(context)),
      loop_(loop),
      counters_(counters),
      options_(options),
      idle_close_(idle_close),
      curve_(std::move(curve)) {}

ZmqDialer::~ZmqDialer() {
  AbandonAll();
  for (const auto& [endpoint, peer] : peers_) {
    loop_.Cancel(peer->idle);
    loop_.Unwatch(peer->socket_watch);
    loop_.Unwatch(peer->monitor_watch);
  }
}

Rpc::CallId ZmqDialer::Call(const std::string& endpoint, proto::Type type, std::string body,
                            TimePoint deadline, Rpc::OnReply on_reply) {
  const Rpc::CallId id = next_call_++;
  const TimePoint now = loop_.Now();
  PendingCall call{endpoint, nullptr, type, now, 0, std::move(on_reply)};

  const auto fail_soon = [&](Status status) {
    call.timer = loop_.CallAt(
        now, [this, id, status = std::move(status)] { Take(id)(kvrelay::Error(status), false); });
    calls_.emplace(id, std::move(call));
    return id;
  };
  const std::string name(proto::TypeName(type));
  if (body.size() > proto::kMaxBodyBytes) {
    return fail_soon({Code::kTooLarge, name + " has " + std::to_string(body.size()) +
                                           " bytes, more than " +
                                           std::to_string(proto::kMaxBodyBytes)});
  }
  if (calls_.size() >= kMaxCalls) {
    return fail_soon({Code::kOverloaded, std::to_string(kMaxCalls) + " calls in flight"});
  }
  if (deadline <= now) {
    return fail_soon({Code::kDeadlineExceeded, name + " to " + endpoint + ": no time left"});
  }
  auto peer = Connect(endpoint);
  if (!peer) return fail_soon(peer.error());

  const int64_t left = std::clamp<int64_t>(WholeMillis(deadline - now), 1, proto::kMaxDurationMs);
  const std::string bytes =
      proto::EncodeEnvelope({type, id, false, static_cast<uint32_t>(left), body});
  if (!(*peer)->socket.Send({{}, bytes})) {
    return fail_soon({Code::kOverloaded, endpoint + " does not take our messages: its queue of " +
                                             std::to_string(options_.queue_messages) + " is full"});
  }
  call.peer = *peer;
  call.timer = loop_.CallAt(deadline, [this, id] { OnDeadline(id); });
  calls_.emplace(id, std::move(call));
  (*peer)->calls.insert(id);
  loop_.Cancel(std::exchange((*peer)->idle, 0));
  return id;
}

void ZmqDialer::AbandonAll() {
  while (!calls_.empty()) Abandon(calls_.begin()->first);
}

void ZmqDialer::Abandon(Rpc::CallId id) {
  // Let go of outside of our tables: what the callback holds may call us when it dies.
  const Rpc::OnReply on_reply = GiveUp(id);
}

Result<std::shared_ptr<ZmqDialer::Peer>> ZmqDialer::Connect(const std::string& endpoint) {
  if (const auto it = peers_.find(endpoint); it != peers_.end()) {
    const std::shared_ptr<Peer> peer = it->second;
    // An idle connection may have broken since the loop last looked: then over a new one.
    if (peer->calls.empty()) OnConnectionEvents(peer);
    if (!peer->dropped) return peer;
  }
  KVRELAY_ASSIGN_OR_RETURN(transport::ZmqSocket socket,
                           transport::ZmqSocket::Create(context_, ZMQ_DEALER, options_));
  KVRELAY_ASSIGN_OR_RETURN(transport::ZmqMonitor monitor,
                           transport::ZmqMonitor::Create(context_, socket, kDialerEvents));
  KVRELAY_ASSIGN_OR_RETURN(const std::string address, UseKey(socket, endpoint));
  KVRELAY_RETURN_IF_ERROR(socket.Connect(address));
  auto peer = std::make_shared<Peer>(endpoint, loop_.Now(), std::move(socket), std::move(monitor));
  // Not shared with the watches, which live as long as the peer is in peers_.
  const std::weak_ptr<Peer> weak = peer;
  peer->socket_watch =
      loop_.WatchSocket(peer->socket.get(), [this, weak] { OnReadable(weak.lock()); });
  peer->monitor_watch =
      loop_.WatchSocket(peer->monitor.get(), [this, weak] { OnConnectionEvents(weak.lock()); });
  peers_.emplace(endpoint, peer);
  return peer;
}

Result<std::string> ZmqDialer::UseKey(transport::ZmqSocket& socket, const std::string& endpoint) {
  KVRELAY_ASSIGN_OR_RETURN(const auto at, transport::KeyedEndpoint::FromText(endpoint));
  if (!at.key.has_value() && curve_ == nullptr) return at.endpoint;
  if (!at.key.has_value()) {
    return kvrelay::Error(Code::kRefused,
                          endpoint + " names no key, and with keys we call nobody without one");
  }
  if (curve_ == nullptr) {
    return kvrelay::Error(Code::kRefused, endpoint + " asks for a key, and we have none");
  }
  if (!curve_->Allows(*at.key)) {
    return kvrelay::Error(Code::kRefused, "the key of " + endpoint + " is not one that we allow");
  }
  KVRELAY_RETURN_IF_ERROR(socket.BeCurveClient(*curve_, *at.key));
  return at.endpoint;
}

Status ZmqDialer::HandshakeFailure(const Peer& peer, uint16_t what) const {
  if (what == ZMQ_EVENT_HANDSHAKE_FAILED_AUTH) {
    return {Code::kRefused,
            peer.endpoint + " does not allow our key " + transport::KeyToText(curve_->public_key)};
  }
  // The monitor does not tell a handshake that took too long from one that was cut.
  if (loop_.Now() - peer.started + kTimerSlack >= options_.handshake) {
    return {Code::kPeerUnreachable, peer.endpoint + " did not finish the handshake in " +
                                        std::to_string(WholeMillis(options_.handshake)) + " ms"};
  }
  if (curve_ == nullptr) {  // perhaps it only died just then
    return {Code::kPeerUnreachable, peer.endpoint +
                                        " broke the connection in its handshake: does it ask for "
                                        "keys (tcp://HOST:PORT#KEY and --key_file)?"};
  }
  return {Code::kRefused, "who listens at " + peer.endpoint + " does not have that key"};
}

void ZmqDialer::OnReadable(const std::shared_ptr<Peer>& peer) {
  for (int i = 0; i < EventLoop::kMessagesPerRound && !peer->dropped; ++i) {
    const std::optional<transport::ZmqMessage> message = peer->socket.Receive();
    if (!message) return;
    peer->connected = true;
    OnMessage(peer, *message);
  }
}

void ZmqDialer::OnConnectionEvents(const std::shared_ptr<Peer>& peer) {
  while (!peer->dropped) {
    const std::optional<transport::ZmqMonitor::Event> event = peer->monitor.Receive();
    if (!event) return;
    if (event->what == ZMQ_EVENT_CONNECTED) {
      peer->connected = true;
    } else if (event->what == ZMQ_EVENT_HANDSHAKE_FAILED_AUTH ||
               event->what == ZMQ_EVENT_HANDSHAKE_FAILED_PROTOCOL ||
               event->what == ZMQ_EVENT_HANDSHAKE_FAILED_NO_DETAIL) {
      Drop(peer, HandshakeFailure(*peer, event->what));
    } else if (event->what == ZMQ_EVENT_DISCONNECTED || event->what == ZMQ_EVENT_CONNECT_RETRIED) {
      // What the peer answered before it went away counts.
      OnReadable(peer);
      Drop(peer, {Code::kPeerUnreachable, peer->connected
                                              ? "the connection to " + peer->endpoint + " broke"
                                              : "cannot connect to " + peer->endpoint});
    }
  }
}

void ZmqDialer::OnMessage(const std::shared_ptr<Peer>& peer, const transport::ZmqMessage& message) {
  const auto reject = [&](uint64_t id, std::string_view reason, const Status& status) {
    counters_.Add("kvrelay_bad_messages_total{reason=\"" + std::string(reason) + "\"}");
    LOG_EVERY_T(WARNING, 1) << "bad reply from " << peer->endpoint << ": " << status.message();
    if (peer->calls.contains(id)) {
      Take(id)(kvrelay::Error(status.Wrap("bad reply from " + peer->endpoint)), false);
    }
  };
  if (message.frame_count != 2 || !message.frames[0].empty()) {
    return reject(0, "frames",
                  {Code::kInvalidArgument, std::to_string(message.frame_count) + " frames"});
  }
  const auto envelope = proto::DecodeEnvelope(message.frames[1]);
  if (!envelope)
    return reject(envelope.error().id, envelope.error().reason, envelope.error().status);

  const Rpc::CallId id = envelope->id;
  if (!peer->calls.contains(id)) return;  // late: the call was given up
  if (envelope->type == proto::Type::kError) {
    const auto error = proto::Decode<proto::Error>(envelope->body);
    if (!error) return reject(id, "malformed", error.error());
    return Take(id)(kvrelay::Error(error->code, error->message), false);
  }
  if (envelope->type != proto::Type::kOk) {
    return reject(
        id, "type",
        {Code::kInvalidArgument, std::string(proto::TypeName(envelope->type)) + " is not a reply"});
  }
  if (envelope->more) {
    const Rpc::OnReply on_reply = calls_.at(id).on_reply;  // it may abandon its own call
    on_reply(std::string(envelope->body), true);
  } else {
    Take(id)(std::string(envelope->body), false);
  }
}

void ZmqDialer::Drop(const std::shared_ptr<Peer>& peer, const Status& status) {
  if (peer->dropped) return;
  peer->dropped = true;
  const std::shared_ptr<Peer> alive = peer;  // through the callbacks
  loop_.Cancel(peer->idle);
  loop_.Unwatch(peer->socket_watch);
  loop_.Unwatch(peer->monitor_watch);
  peers_.erase(peer->endpoint);
  // A callback may call again (and so make a new connection) or abandon others of these.
  while (!alive->calls.empty()) Take (*alive->calls.begin())(kvrelay::Error(status), false);
}

void ZmqDialer::OnDeadline(Rpc::CallId id) {
  const PendingCall& call = calls_.at(id);
  Status status(Code::kDeadlineExceeded,
                call.endpoint + " did not answer " + std::string(proto::TypeName(call.type)) +
                    " in " + std::to_string(WholeMillis(loop_.Now() - call.started)) + " ms" +
                    (call.peer->connected ? "" : ": not connected"));
  GiveUp(id)(kvrelay::Error(std::move(status)), false);
}

Rpc::OnReply ZmqDialer::GiveUp(Rpc::CallId id) {
  const auto it = calls_.find(id);
  if (it == calls_.end()) return nullptr;
  const std::shared_ptr<Peer> peer = it->second.peer;
  Rpc::OnReply on_reply = Take(id);
  if (peer == nullptr) return on_reply;
  if (!peer->connected && peer->calls.empty()) {
    // Nobody waits for a connection that never was: the request must not be delivered when it comes
    // up after all.
    Drop(peer, Status::Ok());
  } else {
    const std::string body = proto::Encode(proto::Empty{});
    const std::string bytes = proto::EncodeEnvelope({proto::Type::kCancelCall, id, false, 0, body});
    // Best effort: the peer also has the deadline and sees the connection end.
    if (!peer->socket.Send({{}, bytes})) {
      LOG_EVERY_T(WARNING, 1) << peer->endpoint << " does not take our messages";
    }
  }
  return on_reply;
}

Rpc::OnReply ZmqDialer::Take(Rpc::CallId id) {
  auto node = calls_.extract(id);
  PendingCall& call = node.mapped();
  loop_.Cancel(call.timer);
  if (const auto& peer = call.peer; peer != nullptr) {
    peer->calls.erase(id);
    if (peer->calls.empty() && !peer->dropped) {
      peer->idle = loop_.CallAfter(idle_close_, [this, weak = std::weak_ptr<Peer>(peer)] {
        if (const auto idle = weak.lock()) Drop(idle, Status::Ok());
      });
    }
  }
  return std::move(call.on_reply);
}

}  // namespace kvrelay::agent
