// Repeats an idempotent call until it is answered. Protocol logic: uses only Rpc and Clock.
#pragma once

#include <functional>
#include <memory>
#include <string>

#include "agent/rpc.h"
#include "base/clock.h"

namespace kvrelay::agent {

struct RetryPolicy {
  int tries = 3;
  Duration per_try = Millis(2000);
  Duration pause = Millis(20);  // before the second try; doubles, at most per_try
};

// One idempotent call. Control thread. Destroying it abandons the call: the callback does not run
// any more, and it may be destroyed from inside its callback.
class RetryingCall {
 public:
  // `who` names the callee in errors: "prefill 10.0.0.7:7601 rank 1". The callback never runs
  // inside the constructor. It gets the reply's body, or the callee's error (not repeated, unless
  // its code is kPeerUnreachable or kDeadlineExceeded), or after the last try or at `deadline`:
  // "kPeerUnreachable: prefill 10.0.0.7:7601 rank 1 did not answer GET_META in 2000 ms (3 tries)".
  RetryingCall(Rpc& rpc, Clock& clock, std::string who, std::string endpoint, proto::Type type,
               std::string body, RetryPolicy policy, TimePoint deadline,
               std::function<void(Result<std::string>)> done);
  ~RetryingCall();
  RetryingCall(const RetryingCall&) = delete;
  RetryingCall& operator=(const RetryingCall&) = delete;

 private:
  struct State;
  std::shared_ptr<State> state_;
};

}  // namespace kvrelay::agent
