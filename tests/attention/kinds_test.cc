// What layers do beyond plain causal attention: sliding windows, soft caps, linear biases.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <limits>

#include "attention/tile_kernel.h"
#include "tests/attention/paged_case.h"

namespace kvrelay::attention {
namespace {

constexpr float kMinusInfinity = -std::numeric_limits<float>::infinity();

// 2^-1, 2^-2, ...: exact, and different in each head.
std::vector<float> Slopes(uint32_t query_heads) {
  std::vector<float> slopes(query_heads);
  for (uint32_t head = 0; head < query_heads; ++head) {
    slopes[head] = std::ldexp(1.0F, -1 - static_cast<int>(head % 8));
  }
  return slopes;
}

std::string Describe(const AttentionKind& kind) {
  return "window " + std::to_string(kind.window) + ", soft cap " + std::to_string(kind.soft_cap) +
         (kind.alibi_slopes.empty() ? "" : ", ALiBi");
}

// --- By hand: one token a row, logits 0, V the token's number.

class OneHead : public testing::Test {
 protected:
  OneHead() : test_({.head_dim = 16, .block_size = 4, .num_blocks = 8}, 1) {
    test_.AddSequence(/*rows=*/1, /*context=*/10);
    const Sequence& sequence = test_.sequences()[0];
    for (uint32_t token = 0; token < 10; ++token) {
      std::byte* v = test_.view().V(0, sequence.blocks[token / 4], 0, token % 4);
      for (uint32_t d = 0; d < 16; ++d) {
        StoreElement(DType::kFp32, v, d, static_cast<float>(token));
      }
    }
  }
  // The first element of the output and the log-sum-exp, the same from all three.
  std::pair<float, float> Run(const AttentionKind& kind, float q) {
    const Batch batch{test_.sequences(), 1, 1.0F, kind};
    std::vector<float> query(16, 0.0F);
    query[0] = q;
    const Output naive = RunNaive(test_, batch, 0, query);
    ExpectNear(naive, RunPaged(test_, batch, 0, query), 1e-6F);
    ExpectNear(naive, RunRelay(test_, batch, {.min_sharers = 1}, 0, query), 1e-6F);
    return {naive.out[0], naive.lse[0]};
  }
  void SetFirstElementOfKeys(float value) {
    const auto& own = test_.sequences()[0].blocks;
    const std::vector<BlockId> blocks(own.begin(), own.end());
    for (uint32_t token = 0; token < 10; ++token) test_.SetK(blocks, token, 0, 0, value);
  }

  PagedCase test_;
};

TEST_F(OneHead, AWindowIsTheRowItselfAndTheLastBeforeIt) {
  EXPECT_FLOAT_EQ(Run({.window = 3}, 0).first, (7 + 8 + 9) / 3.0F);
  EXPECT_FLOAT_EQ(Run({.window = 3}, 0).second, std::log(3.0F));
  EXPECT_FLOAT_EQ(Run({.window = 1}, 0).first, 9);
  EXPECT_FLOAT_EQ(Run({.window = 10}, 0).first, 4.5F);
  EXPECT_FLOAT_EQ(Run({.window = 11}, 0).first, 4.5F);
  EXPECT_FLOAT_EQ(Run({}, 0).first, 4.5F);
}

TEST_F(OneHead, ABiasIsTheSlopeTimesTheWayBack) {
  const std::vector<float> slope = {std::log(2.0F)};  // each token back counts half
  const AttentionKind kind{.window = 3, .alibi_slopes = slope};
  EXPECT_NEAR(Run(kind, 0).first, (7 * 0.25F + 8 * 0.5F + 9) / 1.75F, 1e-5F);
  EXPECT_NEAR(Run(kind, 0).second, std::log(1.75F), 1e-6F);
}

TEST_F(OneHead, ACapBoundsTheLogitThatTheBiasIsAddedTo) {
  SetFirstElementOfKeys(8);
  const std::vector<float> slope = {1.0F};
  EXPECT_NEAR(Run({.window = 1, .soft_cap = 5}, 1).second, 5 * std::tanh(8 / 5.0F), 1e-5F);
  EXPECT_NEAR(Run({.window = 1, .soft_cap = 5}, -1000).second, -5, 1e-5F);
  const double near = 1 + std::exp(-1.0);
  EXPECT_NEAR(Run({.window = 2, .soft_cap = 5, .alibi_slopes = slope}, 1000).second,
              5 + std::log(near), 1e-5F);
}

// --- Against fp64.

AttentionKind RandomKind(PagedCase& test, const std::vector<float>& slopes) {
  constexpr uint32_t kWindows[] = {0, 1, 5, 64, 100, 300};
  AttentionKind kind;
  kind.window = kWindows[test.Uniform(0, 5)];
  if (test.Uniform(0, 1) == 0) kind.soft_cap = 1.0F + static_cast<float>(test.Uniform(0, 40));
  if (test.Uniform(0, 1) == 0) kind.alibi_slopes = slopes;
  return kind;
}

// Shared prefixes, sequences without one, decode and prefill rows in one batch; windows that end
// behind the prefix, inside it, and before it.
TEST(AttentionKinds, RandomBatchesEqualTheOracle) {
  const uint64_t seed = Seed();
  SCOPED_TRACE("KVRELAY_SEED=" + std::to_string(seed));
  std::mt19937_64 random(seed);
  constexpr uint32_t kDims[] = {16, 36, 64, 80, 128};
  constexpr uint32_t kGroups[] = {1, 2, 3, 4, 8};
  for (int round = 0; round < 12; ++round) {
    CacheShape shape;
    DrawNumbers(shape, random);
    shape.format = random() % 2 == 0 ? KvFormat::kNhd : KvFormat::kHnd;
    shape.kv_heads = static_cast<uint32_t>(1 + random() % 3);
    shape.head_dim = kDims[random() % std::size(kDims)];
    shape.block_size = random() % 2 == 0 ? 8 : 16;
    shape.num_blocks = 4096 / shape.block_size;
    const uint32_t query_heads = shape.kv_heads * kGroups[random() % std::size(kGroups)];
    PagedCase test(shape, random());
    for (uint32_t shared = 0; shared < 2; ++shared) {
      const auto& prefix = test.AddPrefix(test.Uniform(1, 400 / shape.block_size));
      const auto tokens = static_cast<uint32_t>(prefix.size() * shape.block_size);
      const uint32_t sharers = test.Uniform(1, 5);
      for (uint32_t i = 0; i < sharers; ++i) {
        const uint32_t own = test.Uniform(1, 90);
        test.AddSequence(i % 2 == 0 ? 1 : test.Uniform(1, own), tokens + own, &prefix);
      }
      test.AddSequence(test.Uniform(1, 40), test.Uniform(40, 600));
    }
    const std::vector<float> slopes = Slopes(query_heads);
    const Batch batch{test.sequences(), query_heads, Scale(shape.head_dim),
                      RandomKind(test, slopes)};
    SCOPED_TRACE("round " + std::to_string(round) + ": " + shape.ToString() + ", " +
                 std::to_string(query_heads) + " query heads, " + Describe(batch.kind));
    const auto q = RandomQuery(test.rows(), query_heads, shape.head_dim, test.random());
    const Output want = RunNaive(test, batch, 0, q);
    ExpectNear(want, RunPaged(test, batch, 0, q), 1e-5F);
    ExpectNear(want, RunRelay(test, batch, {}, 0, q), 1e-5F);
    if (HasFatalFailure()) return;
  }
}

// Keys and queries of small whole numbers but for one element, which makes logits of 1e4 and -1e4:
// every dot product is exact in fp32, so that only masks, biases and the softmax are tested.
void MakeLogitsFar(PagedCase& test, std::vector<float>& q) {
  for (const Sequence& sequence : test.sequences()) {
    std::vector<BlockId> blocks(sequence.prefix.begin(), sequence.prefix.end());
    blocks.insert(blocks.end(), sequence.blocks.begin(), sequence.blocks.end());
    for (uint32_t token = 0; token < sequence.context; ++token) {
      for (uint32_t d = 0; d < test.shape().head_dim; ++d) {
        const float far = token % 3 == 0 ? 100.0F : token % 3 == 1 ? -100.0F : 99.0F;
        test.SetK(blocks, token, 0, d, d == 0 ? far : static_cast<float>((token + d) % 3) - 1);
      }
    }
  }
  for (size_t i = 0; i < q.size(); ++i) {
    const uint32_t d = static_cast<uint32_t>(i % test.shape().head_dim);
    q[i] = d == 0 ? (i % 32 == 0 ? 100.0F : -100.0F) : d < 4 ? 1.0F : 0.0F;
  }
}

// Prefixes and suffixes that end before, at and behind the edges of pages and tiles, and empty
// ones.
class Corners : public testing::TestWithParam<uint32_t> {
 protected:
  // Sequences that share `prefix_tokens` (of them, whole blocks), with `own` tokens more, beside
  // one without a prefix.
  static void Check(uint32_t block_size, uint32_t prefix_tokens, uint32_t own, bool far) {
    constexpr uint32_t kHeads = 2;
    PagedCase test({.head_dim = 16, .block_size = block_size, .num_blocks = 1024 / block_size},
                   prefix_tokens * 100 + own);
    const auto& prefix = test.AddPrefix(prefix_tokens / block_size);
    const uint32_t context = prefix_tokens + own;
    test.AddSequence(1, context, &prefix);
    test.AddSequence(1, context, &prefix);
    test.AddSequence(std::min(3U, own), context, &prefix);
    test.AddSequence(1, std::max(own, 1U));
    auto q = RandomQuery(test.rows(), kHeads, 16, test.random());
    if (far) MakeLogitsFar(test, q);
    const std::vector<float> slopes = Slopes(kHeads);
    const AttentionKind kinds[] = {{},
                                   {.window = 1},
                                   {.window = own + 1},
                                   {.window = own + prefix_tokens / 2 + 1},
                                   {.window = std::max(context, 1U)},
                                   {.soft_cap = 30},
                                   {.alibi_slopes = slopes},
                                   {.window = own + 3, .soft_cap = 30, .alibi_slopes = slopes}};
    for (const AttentionKind& kind : kinds) {
      SCOPED_TRACE(Describe(kind));
      const Batch batch{test.sequences(), kHeads, far ? 1.0F : Scale(16), kind};
      const Output want = RunNaive(test, batch, 0, q);
      ExpectNear(want, RunPaged(test, batch, 0, q), 1e-5F);
      // Two log-sum-exps of 1e4 are rounded to 1e-3, so that their merged weights are, too.
      ExpectNear(want, RunRelay(test, batch, {}, 0, q), far ? 1e-3F : 1e-5F);
      if (context == 0) {
        EXPECT_EQ(want.lse[0], kMinusInfinity);
        EXPECT_EQ(want.out[0], 0);
      }
      if (HasFatalFailure()) return;
    }
  }
};

TEST_P(Corners, EqualTheOracle) {
  const uint32_t prefix = GetParam();
  for (const uint32_t block_size : {1U, 16U}) {
    for (const uint32_t own : {0U, 1U, 15U, 16U, 17U}) {
      for (const bool far : {false, true}) {
        SCOPED_TRACE("blocks of " + std::to_string(block_size) + ", " + std::to_string(own) +
                     " tokens behind the prefix" + (far ? ", logits of 1e4" : ""));
        Check(block_size, prefix, own, far);
        if (HasFatalFailure()) return;
      }
    }
  }
}

INSTANTIATE_TEST_SUITE_P(PrefixTokens, Corners,
                         testing::Values(0, 1, 15, 16, 17, kTileKeys - 1, kTileKeys, kTileKeys + 1),
                         testing::PrintToStringParamName());

// --- Bits.

// A window's first keys lie in whatever tile they lie in without it: neither other rows nor how a
// prompt is cut into steps change a row's bits.
TEST(AttentionKinds, ChunkedPrefillHasTheBitsOfOneStep) {
  constexpr uint32_t kTokens = 700;
  PagedCase test({.kv_heads = 2, .head_dim = 80, .num_blocks = 64}, 10);
  test.AddSequence(kTokens, kTokens);
  const Sequence whole = test.sequences()[0];
  const auto q = RandomQuery(kTokens, 6, 80, test.random());
  const std::vector<float> slopes = Slopes(6);
  for (const uint32_t window : {1U, 50U, 300U}) {
    const AttentionKind kind{.window = window, .soft_cap = 20, .alibi_slopes = slopes};
    const Output want = RunPaged(test, {{&whole, 1}, 6, Scale(80), kind}, 0, q);
    for (const uint32_t step : {1U, 64U, 129U}) {
      SCOPED_TRACE("window " + std::to_string(window) + ", steps of " + std::to_string(step));
      Output got = Unwritten(kTokens, 6, 80);
      for (uint32_t done = 0; done < kTokens; done += step) {
        Sequence part = whole;
        part.first_row = done;
        part.rows = std::min(step, kTokens - done);
        part.context = done + part.rows;
        PagedAttention(test.view(), 0, {{&part, 1}, 6, Scale(80), kind}, q, got.out, got.lse);
      }
      ExpectSameBits(want, got);
      if (HasFatalFailure()) return;
    }
  }
}

TEST(AttentionKinds, ThreadsDoNotChangeBits) {
  PagedCase test({.kv_heads = 2, .head_dim = 64, .num_blocks = 512}, 6);
  const auto& prefix = test.AddPrefix(70);
  for (uint32_t i = 0; i < 70; ++i) test.AddSequence(1, 70 * 16 + 1 + i % 50, &prefix);
  const Batch batch{test.sequences(), 8, Scale(64), {.window = 900}};
  const auto q = RandomQuery(test.rows(), 8, 64, test.random());
  const Output one = ExpectSameBitsOnThreads([&] { return RunRelay(test, batch, {}, 0, q); });
  ExpectNear(RunPaged(test, batch, 0, q), one, 1e-5F);
}

// What is behind a row's window does not reach it, not even an infinity in V or a NaN in K.
TEST(AttentionKinds, TokensBehindTheWindowDoNotReachARow) {
  PagedCase test({.head_dim = 16}, 8);
  const std::vector<BlockId> prefix = test.AddPrefix(5);
  for (int i = 0; i < 3; ++i) test.AddSequence(1, 90, &prefix);
  for (uint32_t token = 0; token < 60; ++token) {
    test.SetK(prefix, token, 0, 3, std::numeric_limits<float>::quiet_NaN());
    StoreElement(DType::kFp32, test.view().V(0, prefix[token / 16], 0, token % 16), 0,
                 std::numeric_limits<float>::infinity());
  }
  const Batch batch{test.sequences(), 2, Scale(16), {.window = 30}};
  const auto q = RandomQuery(3, 2, 16, test.random());
  const Output want = RunNaive(test, batch, 0, q);
  ExpectNear(want, RunPaged(test, batch, 0, q), 1e-5F);
  ExpectNear(want, RunRelay(test, batch, {}, 0, q), 1e-5F);
}

}  // namespace
}  // namespace kvrelay::attention
