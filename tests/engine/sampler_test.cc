#include "engine/sampler.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cmath>
#include <limits>
#include <map>
#include <vector>

namespace kvrelay::engine {
namespace {

constexpr float kNan = std::numeric_limits<float>::quiet_NaN();
constexpr float kInf = std::numeric_limits<float>::infinity();

TEST(SamplerTest, GreedyTakesTheLowestOfTheLargest) {
  EXPECT_EQ(Greedy(std::vector<float>{1, 3, 3, 2}), 1U);
  EXPECT_EQ(Greedy(std::vector<float>{kNan, -5, -1, kNan}), 2U);
  EXPECT_EQ(Greedy(std::vector<float>{kNan, kNan}), 0U);
  EXPECT_EQ(Sample(std::vector<float>{1, 3, 3}, {.temperature = 0, .seed = 9}, 4), 1U);
}

TEST(SamplerTest, DependsOnSeedAndPositionOnly) {
  const std::vector<float> logits(50, 0.0F);
  const SamplingOptions options{.temperature = 1, .seed = 7};
  std::map<uint32_t, int> ids;
  for (uint32_t position = 0; position < 200; ++position) {
    const uint32_t id = Sample(logits, options, position);
    EXPECT_EQ(Sample(logits, options, position), id);
    ++ids[id];
  }
  EXPECT_GT(ids.size(), 40U);
  int differs = 0;
  for (uint32_t position = 0; position < 200; ++position) {
    differs += Sample(logits, options, position) !=
               Sample(logits, {.temperature = 1, .seed = 8}, position);
  }
  EXPECT_GT(differs, 150);
}

TEST(SamplerTest, FrequenciesFollowTheProbabilities) {
  const std::vector<float> logits = {std::log(1.0F), std::log(2.0F), std::log(5.0F)};
  std::vector<int> count(3);
  constexpr int kDraws = 20000;
  for (uint32_t i = 0; i < kDraws; ++i) {
    ++count[Sample(logits, {.temperature = 1, .seed = 3}, i)];
  }
  // Fixed seed: these do not flicker. Three standard deviations are below 0.011.
  EXPECT_NEAR(count[0] / double{kDraws}, 0.125, 0.011);
  EXPECT_NEAR(count[1] / double{kDraws}, 0.25, 0.011);
  EXPECT_NEAR(count[2] / double{kDraws}, 0.625, 0.011);
}

TEST(SamplerTest, TopPCutsTheTail) {
  const std::vector<float> logits = {std::log(0.5F), std::log(0.3F), std::log(0.2F)};
  for (uint32_t i = 0; i < 500; ++i) {
    EXPECT_EQ(Sample(logits, {.temperature = 1, .top_p = 0.4, .seed = 1}, i), 0U);
    EXPECT_LT(Sample(logits, {.temperature = 1, .top_p = 0.7, .seed = 1}, i), 2U);
  }
  // Equal probabilities rank by id: half of four equals is the first two.
  for (uint32_t i = 0; i < 500; ++i) {
    EXPECT_LT(Sample(std::vector<float>(4, 1.0F), {.temperature = 1, .top_p = 0.5, .seed = 1}, i),
              2U);
  }
}

TEST(SamplerTest, TopPSortsAsFarAsNeeded) {
  std::vector<float> logits(1000);
  for (size_t i = 0; i < logits.size(); ++i) logits[i] = static_cast<float>(i % 97) * 0.01F;
  std::map<uint32_t, int> seen;
  for (uint32_t i = 0; i < 100; ++i) {
    ++seen[Sample(logits, {.temperature = 1, .top_p = 0.99, .seed = 5}, i)];
  }
  EXPECT_GT(seen.size(), 80U);
}

TEST(SamplerTest, NeverLeavesTheVocabulary) {
  for (const std::vector<float>& logits : {std::vector<float>{kNan, kNan, kNan},
                                           {-kInf, -kInf, -kInf},
                                           {kInf, kInf, 0},
                                           {1e30F, 1, kNan},
                                           {0}}) {
    for (const double temperature : {1e-6, 1.0, 1e6}) {
      for (const double top_p : {1e-9, 0.5, 1.0}) {
        for (uint32_t i = 0; i < 50; ++i) {
          const SamplingOptions options{temperature, top_p, 11};
          ASSERT_LT(Sample(logits, options, i), logits.size());
        }
      }
    }
  }
  for (uint32_t i = 0; i < 50; ++i) {
    EXPECT_EQ(Sample(std::vector<float>{kNan, 0, kNan}, {.temperature = 1, .seed = 2}, i), 1U);
  }
}

TEST(SamplerTest, RefusesWhatIsNoProbability) {
  for (const SamplingOptions& bad :
       {SamplingOptions{-1, 1, 0}, SamplingOptions{NAN, 1, 0}, SamplingOptions{INFINITY, 1, 0},
        SamplingOptions{1, 0, 0}, SamplingOptions{1, 1.5, 0}, SamplingOptions{1, NAN, 0}}) {
    EXPECT_EQ(bad.Validate().code(), Code::kInvalidArgument);
  }
  EXPECT_TRUE(SamplingOptions{}.Validate().ok());
}

}  // namespace
}  // namespace kvrelay::engine
