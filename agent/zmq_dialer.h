// The calling half of ZmqRpc: one DEALER per peer endpoint, made when first needed and closed when
// idle, and the calls in flight.
//
// A DEALER is one connection. When it is refused or breaks, its calls fail at once and the socket
// goes with everything that was queued in it: ZeroMQ's own reconnecting would deliver requests
// later whose callers have long given up.
#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <string>
#include <unordered_map>
#include <unordered_set>

#include "agent/counters.h"
#include "agent/event_loop.h"
#include "agent/rpc.h"
#include "transport/zmq_socket.h"

namespace kvrelay::agent {

// Control thread. Callbacks of calls in flight do not run any more when it is destroyed.
class ZmqDialer {
 public:
  // More calls in flight than this fail with kOverloaded.
  static constexpr size_t kMaxCalls = 65536;

  ZmqDialer(std::shared_ptr<transport::ZmqContext> context, EventLoop& loop, Counters& counters,
            transport::ZmqSocketOptions options, Duration idle_close,
            std::shared_ptr<const transport::CurveIdentity> curve);
  ~ZmqDialer();
  ZmqDialer(const ZmqDialer&) = delete;
  ZmqDialer& operator=(const ZmqDialer&) = delete;

  // As in Rpc.
  Rpc::CallId Call(const std::string& endpoint, proto::Type type, std::string body,
                   TimePoint deadline, Rpc::OnReply on_reply);
  void Abandon(Rpc::CallId id);
  void AbandonAll();

  size_t connections() const { return peers_.size(); }

 private:
  struct Peer;
  struct PendingCall {
    std::string endpoint;
    std::shared_ptr<Peer> peer;  // null: it failed before it was sent, and `timer` says so
    proto::Type type{};
    TimePoint started;
    Clock::TimerId timer = 0;
    Rpc::OnReply on_reply;
  };

  Result<std::shared_ptr<Peer>> Connect(const std::string& endpoint);
  // Sets the socket up for the key that the endpoint names, or refuses to call who has none or
  // another than we allow; returns the endpoint without it.
  Result<std::string> UseKey(transport::ZmqSocket& socket, const std::string& endpoint);
  // Why a connection ended in its handshake.
  Status HandshakeFailure(const Peer& peer, uint16_t what) const;
  void OnReadable(const std::shared_ptr<Peer>& peer);
  void OnConnectionEvents(const std::shared_ptr<Peer>& peer);
  void OnMessage(const std::shared_ptr<Peer>& peer, const transport::ZmqMessage& message);
  // Closes the connection; its calls fail with `status`.
  void Drop(const std::shared_ptr<Peer>& peer, const Status& status);
  void OnDeadline(Rpc::CallId id);
  // Tells the peer, takes the call out and returns its callback.
  Rpc::OnReply GiveUp(Rpc::CallId id);
  // Takes an answered or failed call out and returns its callback.
  Rpc::OnReply Take(Rpc::CallId id);

  const std::shared_ptr<transport::ZmqContext> context_;
  EventLoop& loop_;
  Counters& counters_;
  const transport::ZmqSocketOptions options_;
  const Duration idle_close_;
  const std::shared_ptr<const transport::CurveIdentity> curve_;  // null: no keys

  Rpc::CallId next_call_ = 1;
  std::unordered_map<Rpc::CallId, PendingCall> calls_;
  std::map<std::string, std::shared_ptr<Peer>> peers_;  // by endpoint
};

}  // namespace kvrelay::agent
