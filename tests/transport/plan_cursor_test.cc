#include "transport/plan_cursor.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cstdlib>
#include <random>
#include <vector>

#include "kvcache/copy_host.h"

namespace kvrelay::transport {
namespace {

constexpr uint64_t kRegionBytes = 1 << 16;

// A plan whose destination runs do not overlap, small enough for the region.
CopyPlan RandomPlan(std::mt19937_64& random) {
  const auto below = [&](uint32_t n) { return static_cast<uint32_t>(random() % n); };
  CopyPlan plan;
  const uint32_t segments = 1 + below(8);
  for (uint32_t i = 0; i < segments; ++i) plan.segments.push_back({1024 * below(16), 2048 * i});
  const uint32_t boxes = 1 + below(3);
  for (uint32_t i = 0; i < boxes; ++i) {
    CopyBox box;
    box.outer = {1 + below(4), below(64), 128};
    box.inner = {1 + below(4), below(64), 32};
    box.run_bytes = 1 + below(32);
    box.first_place = static_cast<uint32_t>(plan.places.size());
    box.num_places = 1 + below(2);
    for (uint64_t p = 0; p < box.num_places; ++p) {
      plan.places.push_back({0, 0, below(512), i * 512 + p * 16384});
    }
    box.first_segment = below(segments);
    box.num_segments = 1 + below(segments - box.first_segment);
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
        ASSERT_LE(copied, std::max<uint64_t>(step, 32));  // a run
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
  plan.places.resize(3);
  EXPECT_TRUE(PlanCursor(plan).done());
}

}  // namespace
}  // namespace kvrelay::transport
