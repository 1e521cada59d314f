#include <gtest/gtest.h>

#include <cmath>
#include <limits>
#include <vector>

#include "attention/attention.h"

namespace kvrelay::attention {
namespace {

constexpr float kEmpty = -std::numeric_limits<float>::infinity();
constexpr float kNan = std::numeric_limits<float>::quiet_NaN();

TEST(MergePartials, WeighsBySumOfExponentials) {
  std::vector<float> out = {1, 2};
  std::vector<float> lse = {std::log(3.0F)};
  MergePartials(out, lse, std::vector<float>{5, 10}, std::vector<float>{std::log(1.0F)}, 2);
  EXPECT_FLOAT_EQ(out[0], (3 * 1 + 1 * 5) / 4.0F);
  EXPECT_FLOAT_EQ(out[1], (3 * 2 + 1 * 10) / 4.0F);
  EXPECT_FLOAT_EQ(lse[0], std::log(4.0F));
}

TEST(MergePartials, AnEmptySideLeavesTheOtherBitForBit) {
  // The empty side's output was never written.
  std::vector<float> out = {0.1F, -0.3F, kNan, kNan, kNan, kNan};
  std::vector<float> lse = {1.5F, kEmpty, kEmpty};
  MergePartials(out, lse, std::vector<float>{kNan, kNan, 0.7F, 0.9F, kNan, kNan},
                std::vector<float>{kEmpty, -2.25F, kEmpty}, 2);
  EXPECT_EQ(out, (std::vector<float>{0.1F, -0.3F, 0.7F, 0.9F, 0, 0}));
  EXPECT_EQ(lse, (std::vector<float>{1.5F, -2.25F, kEmpty}));
}

TEST(MergePartials, ExtremeSumsNeitherOverflowNorVanish) {
  for (const float far : {1e4F, 1e30F}) {
    std::vector<float> out = {1, 1};
    std::vector<float> lse = {far, -far};
    MergePartials(out, lse, std::vector<float>{2, 2}, std::vector<float>{-far, far}, 1);
    EXPECT_EQ(out, (std::vector<float>{1, 2}));
    EXPECT_EQ(lse, (std::vector<float>{far, far}));
  }
  std::vector<float> out = {1};
  std::vector<float> lse = {1e4F};
  MergePartials(out, lse, std::vector<float>{2}, std::vector<float>{1e4F}, 1);
  EXPECT_FLOAT_EQ(out[0], 1.5F);
}

}  // namespace
}  // namespace kvrelay::attention
