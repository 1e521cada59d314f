// Calls from a program that has no control thread of its own: the command line, scripts, tests.
#pragma once

#include <functional>
#include <memory>
#include <string>
#include <string_view>

#include "base/clock.h"
#include "base/status.h"
#include "proto/messages.h"
#include "transport/curve.h"

namespace kvrelay::agent {

// One peer. One thread at a time, which blocks in Call; Interrupt() from anywhere.
class Client {
 public:
  // Checks the endpoint ("tcp://host:port" or "tcp://host:port#KEY"); the connection is made by the
  // first call and again after it broke. `curve`: our key, as in ZmqRpc::Options.
  static Result<Client> Connect(const std::string& endpoint,
                                std::shared_ptr<const transport::CurveIdentity> curve = nullptr);
  Client(Client&&) noexcept;
  Client& operator=(Client&&) noexcept;
  ~Client();

  // The reply's body, or the peer's error, or kPeerUnreachable, kDeadlineExceeded, kCancelled
  // (interrupted).
  Result<std::string> Call(proto::Type type, std::string body, Duration timeout);
  // For requests with several replies: `on_more` gets each but the last, on the calling thread. A
  // failure that it returns ends the call, which the peer is told, and is the result.
  Result<std::string> Stream(proto::Type type, std::string body, Duration timeout,
                             const std::function<Status(std::string_view)>& on_more);

  // Ends the call in progress, or else the next one, with kCancelled; the peer is told. Any thread;
  // async-signal-safe, so that a handler of SIGINT may call it.
  void Interrupt();

 private:
  struct State;
  explicit Client(std::unique_ptr<State> state);
  std::unique_ptr<State> state_;
};

}  // namespace kvrelay::agent
