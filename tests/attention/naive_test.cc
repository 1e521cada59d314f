#include <gtest/gtest.h>

#include <cmath>
#include <limits>

#include "attention/widen.h"
#include "tests/attention/paged_case.h"

namespace kvrelay::attention {
namespace {

// Two tokens, one head, two dimensions, worked out by hand.
TEST(NaiveAttention, EqualsArithmeticByHand) {
  PagedCase test({.head_dim = 2, .block_size = 8, .num_blocks = 4}, 1);
  test.AddSequence(/*rows=*/2, /*context=*/2);
  const std::vector<BlockId> blocks(test.sequences()[0].blocks.begin(),
                                    test.sequences()[0].blocks.end());
  const float k[2][2] = {{1, 0}, {0, 2}};
  const float v[2][2] = {{10, -1}, {20, 3}};
  for (uint32_t token = 0; token < 2; ++token) {
    for (uint32_t d = 0; d < 2; ++d) {
      StoreElement(DType::kFp32, test.view().K(0, blocks[0], 0, token), d, k[token][d]);
      StoreElement(DType::kFp32, test.view().V(0, blocks[0], 0, token), d, v[token][d]);
    }
  }
  const Batch batch{test.sequences(), 1, 0.5F};
  const std::vector<float> q = {2, 4, 2, 1};
  const Output got = RunNaive(test, batch, 0, q);
  // Row 0 sees token 0 only: logit 0.5 * 2. Row 1: logits 0.5 * 2 and 0.5 * 2, so the mean.
  EXPECT_FLOAT_EQ(got.out[0], 10);
  EXPECT_FLOAT_EQ(got.out[1], -1);
  EXPECT_FLOAT_EQ(got.lse[0], 1);
  EXPECT_FLOAT_EQ(got.out[2], 15);
  EXPECT_FLOAT_EQ(got.out[3], 1);
  EXPECT_FLOAT_EQ(got.lse[1], 1 + std::log(2.0F));
}

TEST(NaiveAttention, QueryHeadsShareTheirGroupsKvHead) {
  PagedCase test({.kv_heads = 2, .head_dim = 4, .block_size = 8, .num_blocks = 4}, 2);
  test.AddSequence(1, 1);
  const BlockId block = test.sequences()[0].blocks[0];
  for (uint32_t d = 0; d < 4; ++d) {
    StoreElement(DType::kFp32, test.view().V(0, block, 0, 0), d, 7);
    StoreElement(DType::kFp32, test.view().V(0, block, 1, 0), d, 9);
  }
  const Batch batch{test.sequences(), 6, 1.0F};
  const Output got = RunNaive(test, batch, 0, RandomQuery(1, 6, 4, test.random()));
  for (uint32_t head = 0; head < 6; ++head) EXPECT_EQ(got.out[head * 4], head < 3 ? 7 : 9);
}

TEST(Widen, HalfPrecisionKnownValues) {
  const auto fp16 = [](uint16_t bits) {
    return Widen(DType::kFp16, reinterpret_cast<const std::byte*>(&bits), 0);
  };
  EXPECT_EQ(fp16(0x0000), 0.0F);
  EXPECT_EQ(fp16(0x0001), 0x1p-24F);
  EXPECT_EQ(fp16(0x03FF), 1023 * 0x1p-24F);
  EXPECT_EQ(fp16(0x0400), 0x1p-14F);
  EXPECT_EQ(fp16(0x3C00), 1.0F);
  EXPECT_EQ(fp16(0x3555), 0.333251953125F);
  EXPECT_EQ(fp16(0xC000), -2.0F);
  EXPECT_EQ(fp16(0x7BFF), 65504.0F);
  EXPECT_EQ(fp16(0x7C00), std::numeric_limits<float>::infinity());
  EXPECT_EQ(fp16(0xFC00), -std::numeric_limits<float>::infinity());
  EXPECT_TRUE(std::isnan(fp16(0x7C01)));
}

TEST(Widen, BrainFloatIsTheUpperHalf) {
  const uint16_t bits = 0xC049;  // -3.140625
  EXPECT_EQ(Widen(DType::kBf16, reinterpret_cast<const std::byte*>(&bits), 0), -3.140625F);
}

TEST(Widen, BytesKnownValues) {
  const auto widen = [](DType dtype, uint8_t bits) {
    return Widen(dtype, reinterpret_cast<const std::byte*>(&bits), 0);
  };
  EXPECT_EQ(widen(DType::kFp8E4m3, 0x01), 0x1p-9F);
  EXPECT_EQ(widen(DType::kFp8E4m3, 0xB8), -1.0F);
  EXPECT_EQ(widen(DType::kFp8E4m3, 0x7E), 448.0F);
  EXPECT_TRUE(std::isnan(widen(DType::kFp8E4m3, 0x7F)));
  EXPECT_EQ(widen(DType::kFp8E5m2, 0x01), 0x1p-16F);
  EXPECT_EQ(widen(DType::kFp8E5m2, 0xC1), -2.5F);
  EXPECT_EQ(widen(DType::kFp8E5m2, 0x7B), 57344.0F);
  EXPECT_EQ(widen(DType::kFp8E5m2, 0x7C), std::numeric_limits<float>::infinity());
  EXPECT_EQ(widen(DType::kInt8, 0x80), -128.0F);
  EXPECT_EQ(widen(DType::kInt8, 0x7F), 127.0F);
}

}  // namespace
}  // namespace kvrelay::attention
