#include "agent/call.h"

#include <algorithm>
#include <utility>

namespace kvrelay::agent {

struct RetryingCall::State : std::enable_shared_from_this<RetryingCall::State> {
  State(Rpc& rpc, Clock& clock) : rpc(rpc), clock(clock) {}

  Rpc& rpc;
  Clock& clock;
  std::string who;
  std::string endpoint;
  proto::Type type{};
  std::string body;
  RetryPolicy policy;
  TimePoint started;
  TimePoint deadline;
  std::function<void(Result<std::string>)> done;
  int tried = 0;
  Duration pause{};
  Rpc::CallId call = 0;
  Clock::TimerId timer = 0;
  bool abandoned = false;

  void Try() {
    timer = 0;
    ++tried;
    const TimePoint until = std::min(deadline, clock.Now() + policy.per_try);
    call = rpc.Call(endpoint, type, body, until,
                    [self = shared_from_this()](Result<std::string> reply, bool more) {
                      if (!more && !self->abandoned) self->OnReply(std::move(reply));
                    });
  }

  void OnReply(Result<std::string> reply) {
    call = 0;
    if (reply.has_value()) return Finish(std::move(reply));
    const Code code = reply.error().code();
    if (code != Code::kPeerUnreachable && code != Code::kDeadlineExceeded) {
      return Finish(Error(reply.error().Wrap(who)));
    }
    if (tried >= policy.tries || clock.Now() + pause >= deadline) {
      const auto waited = static_cast<int64_t>(ToMillis(clock.Now() - started));
      return Finish(Error(Code::kPeerUnreachable,
                          who + " did not answer " + std::string(proto::TypeName(type)) + " in " +
                              std::to_string(waited) + " ms (" + std::to_string(tried) +
                              (tried == 1 ? " try): " : " tries): ") + reply.error().message()));
    }
    timer = clock.CallAfter(pause, [self = shared_from_this()] {
      if (!self->abandoned) self->Try();
    });
    pause = std::min(pause * 2, policy.per_try);
  }

  void Finish(Result<std::string> result) {
    abandoned = true;
    const auto callback = std::move(done);
    done = nullptr;
    callback(std::move(result));
  }
};

RetryingCall::RetryingCall(Rpc& rpc, Clock& clock, std::string who, std::string endpoint,
                           proto::Type type, std::string body, RetryPolicy policy,
                           TimePoint deadline, std::function<void(Result<std::string>)> done)
    : state_(std::make_shared<State>(rpc, clock)) {
  state_->who = std::move(who);
  state_->endpoint = std::move(endpoint);
  state_->type = type;
  state_->body = std::move(body);
  state_->policy = policy;
  state_->started = clock.Now();
  state_->deadline = deadline;
  state_->done = std::move(done);
  state_->pause = policy.pause;
  state_->Try();
}

RetryingCall::~RetryingCall() {
  state_->abandoned = true;
  if (state_->call != 0) state_->rpc.Abandon(state_->call);
  if (state_->timer != 0) state_->clock.Cancel(state_->timer);
  state_->done = nullptr;
}

}  // namespace kvrelay::agent
