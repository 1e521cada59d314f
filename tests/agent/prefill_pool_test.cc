#include "agent/prefill_pool.h"

#include <gtest/gtest.h>

namespace kvrelay::agent {
namespace {

// Time that the test turns.
class HandClock final : public Clock {
 public:
  TimePoint Now() const override { return now_; }
  TimerId CallAt(TimePoint, std::function<void()>) override { return 0; }
  void Cancel(TimerId) override {}
  void Pass(Duration duration) { now_ += duration; }

 private:
  TimePoint now_{};
};

class PrefillPoolTest : public testing::Test {
 protected:
  std::string PickAndFail(Code code) {
    const auto endpoint = pool_.Pick(10, {});
    if (!endpoint.has_value()) return "";
    pool_.Done(*endpoint, 10, code);
    return *endpoint;
  }
  HandClock clock_;
  PrefillPool pool_{clock_, {"a", "b"}};
};

TEST_F(PrefillPoolTest, FewestOutstandingTokensFirstTiesByRotation) {
  EXPECT_EQ(pool_.Pick(100, {}), "a");
  EXPECT_EQ(pool_.Pick(10, {}), "b");
  EXPECT_EQ(pool_.Pick(10, {}), "b") << "10 tokens there, 100 at a";
  pool_.Done("a", 100, Code::kOk);
  EXPECT_EQ(pool_.Pick(20, {}), "a");
  EXPECT_EQ(pool_.Pick(1, {}), "b") << "both have 20: the one asked longer ago";
}

TEST_F(PrefillPoolTest, AnotherWorkerFirstButTheSameOneWhenThereIsNoOther) {
  EXPECT_EQ(pool_.Pick(1, {"a"}), "b");
  pool_.SetState("b", PrefillPool::State::kDraining, "");
  EXPECT_EQ(pool_.Pick(1, {"a"}), "a");
}

TEST_F(PrefillPoolTest, ThreeFailuresSetAWorkerAsideForASecondThenOneTrialAtATime) {
  pool_.SetState("a", PrefillPool::State::kReady, "");
  pool_.SetState("b", PrefillPool::State::kDraining, "");
  EXPECT_TRUE(pool_.AnyUsable());
  for (int i = 0; i < 3; ++i) EXPECT_EQ(PickAndFail(Code::kStaleRead), "a");
  EXPECT_EQ(pool_.Pick(1, {}), std::nullopt);
  EXPECT_FALSE(pool_.AnyUsable()) << "whatever its state";
  clock_.Pass(Millis(1001));
  EXPECT_TRUE(pool_.AnyUsable());
  EXPECT_EQ(pool_.Pick(1, {}), "a");
  EXPECT_EQ(pool_.Pick(1, {}), std::nullopt) << "one trial at a time";
  pool_.Done("a", 1, Code::kStaleRead);
  clock_.Pass(Millis(1500));
  EXPECT_EQ(pool_.Pick(1, {}), std::nullopt) << "aside for two seconds now";
  clock_.Pass(Millis(600));
  EXPECT_EQ(pool_.Pick(1, {}), "a");
  pool_.Done("a", 1, Code::kOk);
  EXPECT_EQ(pool_.Pick(1, {}), "a");
  EXPECT_EQ(pool_.Pick(1, {}), "a") << "a success brings it back";
}

TEST_F(PrefillPoolTest, AWorkerThatWasStartedAgainHasACleanSlate) {
  pool_.SetState("b", PrefillPool::State::kDraining, "");
  pool_.SetIncarnation("a", 7);
  for (int i = 0; i < 3; ++i) EXPECT_EQ(PickAndFail(Code::kPeerUnreachable), "a");
  pool_.SetIncarnation("a", 7);
  EXPECT_EQ(pool_.Pick(1, {}), std::nullopt) << "still the one that failed";
  pool_.SetIncarnation("a", 8);
  EXPECT_EQ(pool_.Pick(1, {}), "a");
}

TEST_F(PrefillPoolTest, WhatSaysNothingAboutItsHealthCountsAsNeither) {
  pool_.SetState("b", PrefillPool::State::kDraining, "");
  for (int i = 0; i < 10; ++i) {
    EXPECT_EQ(PickAndFail(Code::kOverloaded), "a");
    EXPECT_EQ(PickAndFail(Code::kCancelled), "a");
  }
}

TEST_F(PrefillPoolTest, AnIncompatibleWorkerIsNotAskedUntilAProbeFindsItReady) {
  pool_.SetState("b", PrefillPool::State::kDraining, "");
  EXPECT_EQ(PickAndFail(Code::kIncompatible), "a");
  EXPECT_EQ(pool_.Pick(1, {}), std::nullopt);
  EXPECT_FALSE(pool_.AnyUsable());
  pool_.SetState("a", PrefillPool::State::kReady, "");
  EXPECT_EQ(pool_.Pick(1, {}), "a");
}

}  // namespace
}  // namespace kvrelay::agent
