#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <limits>

#include "attention/attend_rows.h"
#include "tests/attention/paged_case.h"

namespace kvrelay::attention {
namespace {

constexpr uint32_t kDims[] = {16, 32, 36, 64, 80, 96, 128, 192, 256};
constexpr uint32_t kGroups[] = {1, 2, 3, 4, 8};
constexpr uint32_t kBlockSizes[] = {8, 16, 32};

template <size_t kCount>
uint32_t Pick(const uint32_t (&values)[kCount], std::mt19937_64& random) {
  return values[random() % kCount];
}

CacheShape RandomShape(std::mt19937_64& random) {
  CacheShape shape;
  DrawNumbers(shape, random);
  shape.format = random() % 2 == 0 ? KvFormat::kNhd : KvFormat::kHnd;
  shape.kv_heads = static_cast<uint32_t>(1 + random() % 3);
  shape.head_dim = Pick(kDims, random);
  shape.block_size = Pick(kBlockSizes, random);
  shape.num_blocks = 2048 / shape.block_size;
  shape.gap = random() % 3 == 0 ? 4 : 0;
  return shape;
}

TEST(PagedAttention, RandomBatchesEqualTheOracle) {
  const uint64_t seed = Seed();
  SCOPED_TRACE("KVRELAY_SEED=" + std::to_string(seed));
  std::mt19937_64 random(seed);
  for (int round = 0; round < 40; ++round) {
    const CacheShape shape = RandomShape(random);
    const uint32_t group = Pick(kGroups, random);
    PagedCase test(shape, random());
    const uint32_t sequences = test.Uniform(1, 4);
    for (uint32_t i = 0; i < sequences; ++i) {
      const uint32_t context = test.Uniform(1, 300);
      test.AddSequence(i % 2 == 0 ? 1 : test.Uniform(1, std::min(context, 40U)), context);
    }
    SCOPED_TRACE("round " + std::to_string(round) + ": " + shape.ToString() + ", group " +
                 std::to_string(group));
    const Batch batch{test.sequences(), shape.kv_heads * group, Scale(shape.head_dim)};
    const auto q = RandomQuery(test.rows(), batch.query_heads, shape.head_dim, test.random());
    ExpectNear(RunNaive(test, batch, 0, q), RunPaged(test, batch, 0, q), 1e-5F);
    if (HasFatalFailure()) return;
  }
}

TEST(PagedAttention, EachLayerReadsItsOwnCache) {
  PagedCase test({.layers = 3, .kv_heads = 2, .head_dim = 32}, 5);
  test.AddSequence(4, 30);
  const Batch batch{test.sequences(), 4, Scale(32)};
  const auto q = RandomQuery(4, 4, 32, test.random());
  const Output first = RunPaged(test, batch, 0, q);
  for (uint32_t layer = 0; layer < 3; ++layer) {
    const Output got = RunPaged(test, batch, layer, q);
    ExpectNear(RunNaive(test, batch, layer, q), got, 1e-5F);
    if (layer > 0) {
      EXPECT_NE(first.out, got.out);
    }
  }
}

// Contexts that end before, at and behind the edges of tiles and chunks.
TEST(PagedAttention, EdgesOfTilesAndChunks) {
  for (const uint32_t context : {1U, 15U, 16U, 17U, 63U, 64U, 65U, 255U, 256U, 257U, 511U, 513U}) {
    SCOPED_TRACE(context);
    PagedCase test({.kv_heads = 1, .head_dim = 48}, context);
    test.AddSequence(1, context);
    test.AddSequence(std::min(context, 7U), std::min(context, 300U));
    const Batch batch{test.sequences(), 2, Scale(48)};
    const auto q = RandomQuery(test.rows(), 2, 48, test.random());
    ExpectNear(RunNaive(test, batch, 0, q), RunPaged(test, batch, 0, q), 1e-5F);
  }
}

// Dot products are whole numbers, exact in fp32, so that only the softmax is tested: logits from
// -1e4 to 1e4.
TEST(PagedAttention, LogitsOfTenThousandBothWays) {
  const CacheShape shape{.kv_heads = 1, .head_dim = 16};
  PagedCase test(shape, 6);
  test.AddSequence(3, 200);
  test.AddSequence(1, 90);
  for (const Sequence& sequence : test.sequences()) {
    const std::vector<BlockId> blocks(sequence.blocks.begin(), sequence.blocks.end());
    for (uint32_t token = 0; token < sequence.context; ++token) {
      for (uint32_t d = 0; d < 16; ++d) {
        const float far = token % 3 == 0 ? 100.0F : token % 3 == 1 ? -100.0F : 99.0F;
        test.SetK(blocks, token, 0, d, d == 0 ? far : static_cast<float>(test.Uniform(0, 2)) - 1);
      }
    }
  }
  const Batch batch{test.sequences(), 2, 1.0F};
  std::vector<float> q(test.rows() * size_t{2} * 16);
  for (size_t i = 0; i < q.size(); ++i) q[i] = i % 16 == 0 ? 100.0F : i % 16 < 4 ? 1.0F : 0.0F;
  for (size_t i = 0; i < 16; ++i)
    q[i] = -q[i];  // one head whose largest logits are the others' smallest
  ExpectNear(RunNaive(test, batch, 0, q), RunPaged(test, batch, 0, q), 1e-5F);
}

// A key that a row may see shows in the output when it is NaN: bad bytes are not hidden.
TEST(PagedAttention, AVisibleNanShows) {
  PagedCase test({.kv_heads = 1, .head_dim = 16}, 7);
  test.AddSequence(2, 10);
  const std::vector<BlockId> blocks(test.sequences()[0].blocks.begin(),
                                    test.sequences()[0].blocks.end());
  test.SetK(blocks, 9, 0, 3, std::numeric_limits<float>::quiet_NaN());
  const Batch batch{test.sequences(), 1, 1.0F};
  const Output got = RunPaged(test, batch, 0, RandomQuery(2, 1, 16, test.random()));
  EXPECT_FALSE(std::isnan(got.out[0])) << "row 0 does not see the last token";
  EXPECT_TRUE(std::isnan(got.out[16]));
}

// What a causal row may not see does not reach it, not even an infinity in V.
TEST(PagedAttention, FutureTokensDoNotReachARow) {
  PagedCase test({.kv_heads = 1, .head_dim = 16}, 8);
  test.AddSequence(8, 8);
  const BlockId block = test.sequences()[0].blocks[0];
  for (uint32_t d = 0; d < 16; ++d) {
    StoreElement(DType::kFp32, test.view().V(0, block, 0, 7), d,
                 std::numeric_limits<float>::infinity());
  }
  const Batch batch{test.sequences(), 1, 1.0F};
  const Output got = RunPaged(test, batch, 0, RandomQuery(8, 1, 16, test.random()));
  for (uint32_t row = 0; row < 7; ++row) EXPECT_TRUE(std::isfinite(got.out[row * 16])) << row;
  EXPECT_TRUE(std::isinf(got.out[7 * 16]));
}

// --- A row's bits depend on its own query and keys only.

// Takes one sequence's part of a batch's output.
Output Part(const Output& all, const Sequence& sequence, uint32_t query_heads, uint32_t head_dim) {
  const size_t first = size_t{sequence.first_row} * query_heads;
  const size_t count = size_t{sequence.rows} * query_heads;
  const auto out = all.out.begin() + static_cast<ptrdiff_t>(first * head_dim);
  const auto lse = all.lse.begin() + static_cast<ptrdiff_t>(first);
  return {{out, out + static_cast<ptrdiff_t>(count * head_dim)},
          {lse, lse + static_cast<ptrdiff_t>(count)}};
}

TEST(PagedAttention, ASequenceHasTheSameBitsAloneAndInABatch) {
  std::mt19937_64 random(Seed());
  SCOPED_TRACE("KVRELAY_SEED=" + std::to_string(Seed()));
  for (int round = 0; round < 6; ++round) {
    CacheShape shape = RandomShape(random);
    shape.num_blocks = 8192 / shape.block_size;
    const uint32_t group = Pick(kGroups, random);
    PagedCase test(shape, random());
    test.AddSequence(1, 1500);  // long enough for its chunks to be shared out when it is alone
    for (int i = 0; i < 15; ++i) {
      const uint32_t context = test.Uniform(1, 300);
      test.AddSequence(i % 3 == 0 ? test.Uniform(1, std::min(context, 40U)) : 1, context);
    }
    const Batch batch{test.sequences(), shape.kv_heads * group, Scale(shape.head_dim)};
    const auto q = RandomQuery(test.rows(), batch.query_heads, shape.head_dim, test.random());
    const Output together = RunPaged(test, batch, 0, q);
    for (const Sequence& sequence : test.sequences()) {
      const Batch alone{{&sequence, 1}, batch.query_heads, batch.scale};
      ExpectSameBits(
          Part(together, sequence, batch.query_heads, shape.head_dim),
          Part(RunPaged(test, alone, 0, q), sequence, batch.query_heads, shape.head_dim));
      if (HasFatalFailure()) return;
    }
  }
}

TEST(PagedAttention, ThreadsDoNotChangeBits) {
  PagedCase test({.kv_heads = 2, .head_dim = 64, .num_blocks = 512}, 9);
  test.AddSequence(1, 5000);
  test.AddSequence(100, 1000);
  test.AddSequence(1, 40);
  const Batch batch{test.sequences(), 8, Scale(64)};
  const auto q = RandomQuery(test.rows(), 8, 64, test.random());
  ExpectSameBitsOnThreads([&] { return RunPaged(test, batch, 0, q); });
}

// A prompt computed in one step, in chunks of any size, or token by token; its head in a shared
// prefix or in its own blocks.
TEST(PagedAttention, ChunkedPrefillHasTheBitsOfOneStep) {
  constexpr uint32_t kTokens = 330;
  PagedCase test({.kv_heads = 2, .head_dim = 80, .num_blocks = 64}, 10);
  test.AddSequence(kTokens, kTokens);
  const Sequence whole = test.sequences()[0];
  const auto q = RandomQuery(kTokens, 6, 80, test.random());
  const Output want = RunPaged(test, {{&whole, 1}, 6, Scale(80)}, 0, q);
  for (const uint32_t step : {1U, 7U, 64U, 129U}) {
    SCOPED_TRACE(step);
    Output got = Unwritten(kTokens, 6, 80);
    for (uint32_t done = 0; done < kTokens; done += step) {
      Sequence part = whole;
      part.first_row = done;
      part.rows = std::min(step, kTokens - done);
      part.context = done + part.rows;
      part.prefix = whole.blocks.first(std::min<size_t>(part.context / 16, 3));
      part.blocks = whole.blocks.subspan(part.prefix.size());
      PagedAttention(test.view(), 0, {{&part, 1}, 6, Scale(80)}, q, got.out, got.lse);
    }
    ExpectSameBits(want, got);
  }
}

TEST(PagedAttention, NothingToDo) {
  PagedCase test({.head_dim = 16}, 11);
  RunPaged(test, {{}, 1, 1.0F}, 0, {});
  test.AddSequence(0, 20);  // no new rows
  const Output got = RunPaged(test, {test.sequences(), 1, 1.0F}, 0, {});
  EXPECT_TRUE(got.out.empty());
}

}  // namespace
}  // namespace kvrelay::attention
