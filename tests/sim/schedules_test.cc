// A hundred thousand schedules (KVRELAY_SIM_SCHEDULES says another number), in four tests that run
// side by side. A failure prints its seed; KVRELAY_SEED=N runs that one alone.
#include <gtest/gtest.h>

#include <iostream>
#include <string>

#include "tests/common/from_env.h"
#include "tests/sim/schedule.h"

namespace kvrelay::sim {
namespace {

using tests::FromEnv;

constexpr uint64_t kParts = 4;

class Schedules : public testing::TestWithParam<uint64_t> {};

TEST_P(Schedules, HoldTheInvariants) {
  const uint64_t only = FromEnv("KVRELAY_SEED", 0);
  const uint64_t total = FromEnv("KVRELAY_SIM_SCHEDULES", 100'000);
  Outcomes sum;
  const uint64_t first = only != 0 ? only : GetParam() + 1;
  const uint64_t last = only != 0 ? only : total;
  for (uint64_t seed = first; seed <= last; seed += kParts) {
    const Outcomes outcomes = RunSchedule({.seed = seed, .faults = true});
    ASSERT_EQ(outcomes.violation, "") << "KVRELAY_SEED=" << seed;
    sum.served += outcomes.served;
    sum.prefix_hits += outcomes.prefix_hits;
    sum.failed += outcomes.failed;
    sum.cancelled += outcomes.cancelled;
    sum.no_room += outcomes.no_room;
    sum.retried += outcomes.retried;
    sum.loaded += outcomes.loaded;
  }
  std::cout << "served " << sum.served << " (" << sum.prefix_hits
            << " with a prefix that was here), retries " << sum.retried << ", failed " << sum.failed
            << ", cancelled " << sum.cancelled << ", no room " << sum.no_room
            << "; served by a second engine " << sum.loaded << "\n";
  if (only != 0) return;
  // The schedules reach what they are about.
  EXPECT_GT(sum.served, total / kParts);
  EXPECT_GT(sum.prefix_hits, total / kParts / 10);
  EXPECT_GT(sum.retried, total / kParts / 100);
  EXPECT_GT(sum.failed, total / kParts / 100);
  EXPECT_GT(sum.cancelled, total / kParts / 100);
  EXPECT_GT(sum.loaded, total / kParts / 100);
}

INSTANTIATE_TEST_SUITE_P(Parts, Schedules, testing::Range<uint64_t>(0, kParts));

TEST(CalmSchedules, ServeEverything) {
  for (uint64_t seed = 1; seed <= 500; ++seed) {
    const Outcomes outcomes = RunSchedule({.seed = seed, .faults = false, .cancels = false});
    ASSERT_EQ(outcomes.violation, "") << "seed " << seed;
    ASSERT_EQ(outcomes.cancelled, 0U) << "seed " << seed;
    ASSERT_EQ(outcomes.failed, 0U) << "seed " << seed << ": " << outcomes.last_failure;
    ASSERT_GT(outcomes.served, 0U) << "seed " << seed;
  }
}

TEST(CalmSchedules, UsersThatLeaveAreNobodyElsesTrouble) {
  uint64_t cancelled = 0;
  for (uint64_t seed = 1; seed <= 1000; ++seed) {
    const Outcomes outcomes = RunSchedule({.seed = seed, .faults = false, .cancels = true});
    ASSERT_EQ(outcomes.violation, "") << "seed " << seed;
    ASSERT_EQ(outcomes.failed, 0U) << "seed " << seed;
    cancelled += outcomes.cancelled;
  }
  EXPECT_GT(cancelled, 100U);
}

}  // namespace
}  // namespace kvrelay::sim
