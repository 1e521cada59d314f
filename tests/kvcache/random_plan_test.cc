// The planner against an oracle that knows nothing but the address formula: cases drawn over the
// whole product of models, splits, layouts, block sizes, ranges and dtypes.
//
//   KVRELAY_SEED=<seed>          the same cases again
//   KVRELAY_PLAN_CASES=<number>  so many
//   KVRELAY_PLAN_CASE="<case>"   one case alone: what a failure prints
#include <gtest/gtest.h>

#include <atomic>
#include <cstdlib>
#include <iostream>
#include <mutex>
#include <optional>
#include <thread>
#include <vector>

#include "base/cpu.h"
#include "tests/common/from_env.h"
#include "tests/common/slowness.h"
#include "tests/kvcache/plan_case.h"

namespace kvrelay {
namespace {

using testing_support::CheckPlanCase;
using testing_support::PlanCase;
using testing_support::Random;
using testing_support::ShrinkPlanCase;
using testing_support::TestSeed;

constexpr uint64_t kPlanCases = tests::Slowness() > 1 ? 20'000 : 200'000;

TEST(RandomPlan, PullsMoveExactlyTheElementsOfTheReader) {
  if (const char* line = std::getenv("KVRELAY_PLAN_CASE"); line != nullptr) {
    const PlanCase c = PlanCase::Parse(line);
    EXPECT_EQ(CheckPlanCase(c), "") << c.ToString();
    return;
  }
  const uint64_t seed = TestSeed();
  const uint64_t cases = tests::FromEnv("KVRELAY_PLAN_CASES", kPlanCases);
  std::atomic<uint64_t> next{0};
  std::mutex mutex;
  std::optional<PlanCase> failed;
  std::vector<std::thread> threads;
  for (int i = 0; i < AvailableThreads(); ++i) {
    threads.emplace_back([&] {
      for (uint64_t index = next++; index < cases; index = next++) {
        Random random(seed + index);
        const PlanCase c = PlanCase::Random(random);
        if (CheckPlanCase(c).empty()) continue;
        const std::lock_guard lock(mutex);
        failed = c;
        next = cases;
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  if (!failed) {
    std::cout << cases << " cases" << std::endl;
    return;
  }
  const PlanCase small = ShrinkPlanCase(*failed);
  FAIL() << CheckPlanCase(small) << "\nagain with KVRELAY_PLAN_CASE=\"" << small.ToString()
         << "\"\nfound as \"" << failed->ToString() << "\": " << CheckPlanCase(*failed);
}

// The test can fail, and its line can be read back.
TEST(RandomPlan, ACaseIsItsLine) {
  Random random(7);
  for (int i = 0; i < 100; ++i) {
    const PlanCase c = PlanCase::Random(random);
    EXPECT_EQ(PlanCase::Parse(c.ToString()).ToString(), c.ToString());
  }
}

}  // namespace
}  // namespace kvrelay
