#include "agent/call.h"

#include <gtest/gtest.h>

#include <deque>
#include <memory>
#include <optional>
#include <string>
#include <utility>

#include "agent/event_loop.h"

namespace kvrelay::agent {
namespace {

// Answers each call with the next line of a script, later than asked.
class ScriptedRpc final : public Rpc {
 public:
  explicit ScriptedRpc(EventLoop& loop) : loop_(loop) {}

  void Handle(proto::Type, Handler) override {}
  CallId Call(const std::string&, proto::Type, std::string body, TimePoint deadline,
              OnReply on_reply) override {
    last_body = std::move(body);
    ++calls;
    if (script.empty()) {
      loop_.CallAt(deadline,
                   [on_reply] { on_reply(Error(Code::kDeadlineExceeded, "no answer"), false); });
    } else {
      loop_.CallAfter(Millis(1),
                      [on_reply, answer = std::move(script.front())] { on_reply(answer, false); });
      script.pop_front();
    }
    return static_cast<CallId>(calls);
  }
  void Abandon(CallId id) override { abandoned = id; }

  std::deque<Result<std::string>> script;
  std::string last_body;
  int calls = 0;
  CallId abandoned = 0;

 private:
  EventLoop& loop_;
};

class RetryingCallTest : public testing::Test {
 protected:
  void Start(RetryPolicy policy = {}, Duration deadline = Millis(5000)) {
    call = std::make_unique<RetryingCall>(
        rpc, loop, "prefill 10.0.0.7:7601 rank 1", "tcp://10.0.0.7:7601", proto::Type::kGetMeta,
        "body", policy, loop.Now() + deadline, [this](Result<std::string> result) {
          outcome = std::move(result);
          call.reset();  // from inside its callback
          loop.Stop();
        });
    EXPECT_FALSE(outcome.has_value()) << "never inside the constructor";
  }
  std::string Why() const {
    return outcome->has_value() ? "it was answered" : outcome->error().ToString();
  }

  EventLoop loop;
  ScriptedRpc rpc{loop};
  std::unique_ptr<RetryingCall> call;
  std::optional<Result<std::string>> outcome;
};

TEST_F(RetryingCallTest, GivesTheAnswer) {
  rpc.script = {std::string("meta")};
  Start();
  loop.Run();
  EXPECT_EQ(outcome->value(), "meta");
  EXPECT_EQ(rpc.calls, 1);
}

TEST_F(RetryingCallTest, RepeatsWhatWasNotAnsweredWithTheSameBody) {
  rpc.script = {Error(Code::kPeerUnreachable, "refused"), Error(Code::kDeadlineExceeded, "slow"),
                std::string("meta")};
  Start({.tries = 3, .per_try = Millis(500), .pause = Millis(1)});
  loop.Run();
  EXPECT_EQ(outcome->value(), "meta");
  EXPECT_EQ(rpc.calls, 3);
  EXPECT_EQ(rpc.last_body, "body");
}

TEST_F(RetryingCallTest, DoesNotRepeatWhatWasRefused) {
  rpc.script = {Error(Code::kRefused, "no such lease")};
  Start();
  loop.Run();
  EXPECT_EQ(Why(), "kRefused: prefill 10.0.0.7:7601 rank 1: no such lease");
  EXPECT_EQ(rpc.calls, 1);
}

TEST_F(RetryingCallTest, GivesUpAfterTheLastTryAndSaysHowOften) {
  Start({.tries = 3, .per_try = Millis(5), .pause = Millis(1)});
  loop.Run();
  const std::string why = Why();
  EXPECT_TRUE(
      why.starts_with("kPeerUnreachable: prefill 10.0.0.7:7601 rank 1 did not answer GET_META in "))
      << why;
  EXPECT_NE(why.find(" ms (3 tries)"), std::string::npos) << why;
  EXPECT_EQ(rpc.calls, 3);
}

TEST_F(RetryingCallTest, EndsAtItsDeadlineWhateverTriesAreLeft) {
  const TimePoint start = loop.Now();
  Start({.tries = 1000, .per_try = Millis(5), .pause = Millis(1)}, Millis(30));
  loop.Run();
  EXPECT_FALSE(outcome->has_value());
  EXPECT_LE(rpc.calls, 6);
  EXPECT_GE(loop.Now() - start, Millis(20));
}

TEST_F(RetryingCallTest, DestroyingItAbandonsTheCall) {
  Start();
  call.reset();
  EXPECT_EQ(rpc.abandoned, 1U);
  loop.CallAfter(Millis(5), [this] { loop.Stop(); });
  loop.Run();
  EXPECT_FALSE(outcome.has_value());
}

}  // namespace
}  // namespace kvrelay::agent
