#include "transport/plan_cursor.h"

#include <gtest/gtest.h>

#include <cstdlib>
#include <random>
#include <vector>

#include "kvcache/copy_host.h"

namespace kvrelay::transport {
namespace {

constexpr uint64_t kRegionBytes = 1 << 16;

// A plan whose destination runs do not overlap, small enough for the region.
CopyPlan RandomPlan(std::mt19937_64& random) {
  const auto below = [&](uint64_t n) { return random() % n; };
  CopyPlan plan;
  plan.src_block_stride = 1024;
  plan.dst_block_stride = 2048;
  const size_t pairs = 1 + below(8);
  for (size_t i = 0; i < pairs; ++i) {
    plan.pairs.push_back({static_cast<uint32_t>(below(16)), static_cast<uint32_t>(i)});
  }
  for (size_t i = 0; i < 1 + below(3); ++i) {
    CopyBox box;
    box.outer = {static_cast<uint32_t>(1 + below(4)), static_cast<int64_t>(below(64)), 128};
    box.inner = {static_cast<uint32_t>(1 + below(4)), static_cast<int64_t>(below(64)), 32};
    box.run_bytes = 1 + below(32);
    box.src_offset = static_cast<int64_t>(below(512));
    box.dst_offset = static_cast<int64_t>(i * 512);
    box.first_pair = static_cast<uint32_t>(below(pairs));
    box.num_pairs = static_cast<uint32_t>(1 + below(pairs - box.first_pair));
    plan.boxes.push_back(box);
  }
  return plan;
}

TEST(PlanCursorTest, StepsOfAnySizeCopyWhatThePlanCopies) {
  const char* fixed = std::getenv("KVRELAY_SEED");
  const uint64_t seed =
      fixed != nullptr ? std::strtoull(fixed, nullptr, 0) : std::random_device{}();
  SCOPED_TRACE("KVRELAY_SEED=" + std::to_string(seed));
  std::mt19937_64 random(seed);
  std::vector<std::byte> source(kRegionBytes);
  for (std::byte& b : source) b = static_cast<std::byte>(random());
  const std::byte* const sources[] = {source.data()};
  for (int round = 0; round < 60; ++round) {
    const CopyPlan plan = RandomPlan(random);
    const uint64_t region_bytes = kRegionBytes;
    ASSERT_TRUE(plan.Validate(std::span(&region_bytes, 1), std::span(&region_bytes, 1)).ok());
    std::vector<std::byte> want(kRegionBytes);
    std::byte* const wants[] = {want.data()};
    ExecuteCopy(plan, sources, wants);
    for (const uint64_t step : {1UL, 7UL, 100UL, 1000UL, 1UL << 20}) {
      std::vector<std::byte> got(kRegionBytes);
      std::byte* const gots[] = {got.data()};
      PlanCursor cursor(plan);
      uint64_t bytes = 0;
      while (!cursor.done()) {
        const uint64_t copied = cursor.Step(step, sources, gots);
        ASSERT_GT(copied, 0U);
        ASSERT_LE(copied, step);
        bytes += copied;
      }
      ASSERT_EQ(bytes, plan.bytes());
      ASSERT_EQ(got, want) << "round " << round << ", step " << step;
    }
  }
}

TEST(PlanCursorTest, AnEmptyPlanIsDone) {
  EXPECT_TRUE(PlanCursor({}).done());
  CopyPlan plan;
  plan.boxes.resize(3);  // without pairs
  EXPECT_TRUE(PlanCursor(plan).done());
}

}  // namespace
}  // namespace kvrelay::transport
