// The real Rpc: calls over ZeroMQ, PROTOCOL.md's envelope in ROUTER and DEALER frames.
#pragma once

#include <memory>
#include <string>

#include "agent/counters.h"
#include "agent/event_loop.h"
#include "agent/rpc.h"
#include "agent/zmq_dialer.h"
#include "agent/zmq_listener.h"
#include "transport/zmq_socket.h"

namespace kvrelay::agent {

// Control thread; created before or inside loop.Run(), destroyed inside or after it. Destroying it
// drops calls in flight (their callbacks do not run) and gives answers that were sent up to
// `linger` to leave.
class ZmqRpc final : public Rpc {
 public:
  struct Options {
    std::string listen;  // "tcp://host:port", port 0: any; empty: only calls
    // Keys: only who has an allowed one may call, and only endpoints that name an allowed one
    // (transport::KeyedEndpoint) are called; what crosses is encrypted. Null: no keys; endpoints
    // that name one are not called.
    std::shared_ptr<const transport::CurveIdentity> curve;
    transport::ZmqSocketOptions socket;
    Duration linger = Millis(200);                   // of answers at the end
    Duration idle_close = std::chrono::seconds(60);  // connections without a call
  };

  // kInvalidArgument names the endpoint: "cannot listen on tcp://127.0.0.1:7600: port taken (...)".
  static Result<std::unique_ptr<ZmqRpc>> Create(EventLoop& loop, Counters& counters,
                                                Options options);
  ~ZmqRpc() override;

  // Where it listens, with the real port and our public key if there is one; empty when it does
  // not.
  std::string endpoint() const;
  // Open DEALERs.
  size_t connections() const { return dialer_.connections(); }

  // As in Rpc; without `listen` nobody asks.
  void Handle(proto::Type type, Handler handler) override;
  CallId Call(const std::string& endpoint, proto::Type type, std::string body, TimePoint deadline,
              OnReply on_reply) override;
  void Abandon(CallId id) override;
  // Abandons all calls in flight; what their callbacks hold goes with them.
  void AbandonAll() { dialer_.AbandonAll(); }

 private:
  ZmqRpc(std::shared_ptr<transport::ZmqContext> context, EventLoop& loop, Counters& counters,
         const Options& options, std::shared_ptr<ZmqListener> listener);

  // Declared first: it goes last, after the sockets.
  std::shared_ptr<transport::ZmqContext> context_;
  std::shared_ptr<ZmqListener> listener_;
  ZmqDialer dialer_;
};

}  // namespace kvrelay::agent
