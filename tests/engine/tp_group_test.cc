#include "engine/tp_group.h"

#include <gtest/gtest.h>

#include <atomic>
#include <random>

#include "engine_testing.h"

namespace kvrelay::engine {
namespace {

class TpGroupTest : public testing::TestWithParam<uint32_t> {};

TEST_P(TpGroupTest, AddsUpInTheOrderOfTheRanks) {
  const uint32_t size = GetParam();
  TpGroup group(size);
  std::mt19937 random(static_cast<uint32_t>(TestSeed()));
  std::uniform_real_distribution<float> uniform(-1e6F, 1e6F);
  for (const size_t count : {size_t{1}, size_t{3}, size_t{1000}}) {
    std::vector<std::vector<float>> data(size, std::vector<float>(count));
    std::vector<float> want(count);
    for (auto& part : data) {
      for (float& value : part) value = uniform(random);
    }
    for (size_t i = 0; i < count; ++i) {
      want[i] = data[0][i];
      for (uint32_t rank = 1; rank < size; ++rank) want[i] += data[rank][i];
    }
    const Status status =
        group.Run([&](uint32_t rank) { return group.AllReduce(rank, data[rank]); });
    ASSERT_TRUE(status.ok());
    for (const auto& part : data) EXPECT_EQ(part, want);
  }
}

TEST_P(TpGroupTest, ManyStepsAndReductionsKeepInStep) {
  const uint32_t size = GetParam();
  TpGroup group(size);
  for (int step = 0; step < 40; ++step) {
    std::vector<float> sums(size);
    const Status status = group.Run([&](uint32_t rank) -> Status {
      for (int i = 0; i < 5; ++i) {
        float one = static_cast<float>(i);
        KVRELAY_RETURN_IF_ERROR(group.AllReduce(rank, {&one, 1}));
        sums[rank] += one;
      }
      return Status::Ok();
    });
    ASSERT_TRUE(status.ok());
    for (const float sum : sums) ASSERT_EQ(sum, static_cast<float>(10 * size));
  }
}

TEST_P(TpGroupTest, TheFirstErrorWinsAndNobodyIsLeftWaiting) {
  const uint32_t size = GetParam();
  TpGroup group(size);
  for (uint32_t bad = 0; bad < size; ++bad) {
    std::atomic<uint32_t> cancelled = 0;
    const Status status = group.Run([&](uint32_t rank) -> Status {
      if (rank == bad) return {Code::kResourceExhausted, "rank " + std::to_string(rank)};
      float one = 1;
      Status reduced = group.AllReduce(rank, {&one, 1});
      if (reduced.code() == Code::kCancelled) ++cancelled;
      return reduced;
    });
    EXPECT_EQ(status.code(), Code::kResourceExhausted);
    EXPECT_EQ(status.message(), "rank " + std::to_string(bad));
    EXPECT_EQ(cancelled, size - 1);
    // And the next step runs.
    std::vector<float> sums(size, 1);
    EXPECT_TRUE(group.Run([&](uint32_t rank) {
                       return group.AllReduce(rank, {&sums[rank], 1});
                     })
                    .ok());
    EXPECT_EQ(sums, std::vector<float>(size, static_cast<float>(size)));
  }
}

TEST_P(TpGroupTest, EndsCleanlyWithoutAStep) { const TpGroup group(GetParam()); }

INSTANTIATE_TEST_SUITE_P(Sizes, TpGroupTest, testing::Values(1, 2, 3, 4, 8));

}  // namespace
}  // namespace kvrelay::engine
