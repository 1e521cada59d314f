#include "transport/plan_runs.h"

#include <gtest/gtest.h>

#include <cstdlib>
#include <iostream>
#include <map>
#include <random>
#include <set>
#include <string>
#include <tuple>

namespace kvrelay::transport {
namespace {

using Byte = std::tuple<RegionId, uint64_t, RegionId, uint64_t>;

CopyPlan Blocks(const std::vector<uint64_t>& src, const std::vector<uint64_t>& dst,
                uint64_t bytes) {
  CopyPlan plan;
  plan.boxes.resize(1);
  plan.boxes[0].run_bytes = bytes;
  plan.boxes[0].num_segments = static_cast<uint32_t>(src.size());
  plan.places.resize(1);
  for (size_t i = 0; i < src.size(); ++i) plan.segments.push_back({src[i] * bytes, dst[i] * bytes});
  return plan;
}

TEST(PlanRunsTest, JoinsBlocksThatAreNeighboursOnBothSides) {
  PlanRuns runs(Blocks({4, 5, 6, 9, 10}, {0, 1, 2, 3, 5}, 100));
  const auto first = runs.Next(UINT64_MAX);
  ASSERT_TRUE(first.has_value());
  EXPECT_EQ(first->bytes, 300U);
  EXPECT_EQ(first->src, 400U);
  EXPECT_EQ(first->dst, 0U);
  EXPECT_EQ(runs.Next(UINT64_MAX)->bytes, 100U);  // 9 and 10 part ways in the destination
  EXPECT_EQ(runs.Next(UINT64_MAX)->dst, 500U);
  EXPECT_FALSE(runs.Next(UINT64_MAX).has_value());
  EXPECT_FALSE(runs.Next(UINT64_MAX).has_value());
}

TEST(PlanRunsTest, LongRunsComeInPieces) {
  PlanRuns runs(Blocks({0, 1, 2}, {7, 8, 9}, 100));
  uint64_t at = 0;
  while (const auto run = runs.Next(70)) {
    EXPECT_EQ(run->src, at);
    EXPECT_EQ(run->dst, 700 + at);
    EXPECT_LE(run->bytes, 70U);
    at += run->bytes;
  }
  EXPECT_EQ(at, 300U);
}

TEST(PlanRunsTest, AnEmptyPlanHasNone) {
  EXPECT_FALSE(PlanRuns(CopyPlan{}).Next(1).has_value());
  EXPECT_EQ(MeanRunBytes(CopyPlan{}), 0U);
}

TEST(PlanRunsTest, MeanIsThatOfJoinedRuns) {
  EXPECT_EQ(MeanRunBytes(Blocks({0, 2, 4}, {0, 2, 4}, 4096)), 4096U);
  EXPECT_EQ(MeanRunBytes(Blocks({0, 1, 2, 3}, {5, 6, 7, 8}, 4096)), 16384U);
}

// Whatever the plan and the limit: the same bytes from the same places as the plan's definition
// says, each once.
TEST(PlanRunsTest, MovesWhatThePlanSays) {
  const char* given = std::getenv("KVRELAY_SEED");
  const uint64_t seed = given != nullptr ? std::stoull(given) : std::random_device{}();
  std::cout << "KVRELAY_SEED=" << seed << "\n";
  std::mt19937_64 random(seed);
  const auto below = [&](uint64_t n) { return random() % n; };
  for (int round = 0; round < 300; ++round) {
    CopyPlan plan;
    plan.boxes.resize(1 + below(3));
    for (CopyBox& box : plan.boxes) {
      box.first_place = static_cast<uint32_t>(plan.places.size());
      box.num_places = static_cast<uint32_t>(1 + below(3));
      for (uint32_t p = 0; p < box.num_places; ++p) {
        plan.places.push_back({static_cast<RegionId>(below(2)), static_cast<RegionId>(below(2)),
                               below(4) * 64, below(4) * 64});
      }
      box.first_segment = static_cast<uint32_t>(plan.segments.size());
      box.num_segments = static_cast<uint32_t>(1 + below(4));
      for (uint32_t s = 0; s < box.num_segments; ++s) {
        plan.segments.push_back({below(4) * 32, below(4) * 32});
      }
      box.run_bytes = 1 + below(16);
      box.inner = {static_cast<uint32_t>(1 + below(3)), box.run_bytes * (1 + below(2)),
                   box.run_bytes * (1 + below(2))};
      box.outer = {static_cast<uint32_t>(1 + below(3)), 3 * box.inner.src_stride,
                   3 * box.inner.dst_stride};
    }
    std::multiset<Byte> expected;
    ForEachRun(plan, [&](const CopyBox& box, const PlanRun& run) {
      for (uint64_t b = 0; b < box.run_bytes; ++b) {
        expected.insert({run.src_region, run.src + b, run.dst_region, run.dst + b});
      }
    });
    std::multiset<Byte> got;
    PlanRuns runs(plan);
    const uint64_t limit = 1 + below(64);
    while (const auto run = runs.Next(limit)) {
      ASSERT_GT(run->bytes, 0U);
      ASSERT_LE(run->bytes, limit);
      for (uint64_t b = 0; b < run->bytes; ++b) {
        got.insert({run->src_region, run->src + b, run->dst_region, run->dst + b});
      }
    }
    ASSERT_EQ(got, expected) << "round " << round;
  }
}

}  // namespace
}  // namespace kvrelay::transport
