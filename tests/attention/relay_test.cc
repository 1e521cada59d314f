#include <gtest/gtest.h>

#include <cmath>

#include "tests/attention/paged_case.h"

namespace kvrelay::attention {
namespace {

// Several prefixes of which some are shared, sequences without a prefix, decode rows and prefill
// rows in one batch.
TEST(RelayAttention, RandomBatchesEqualPagedAndTheOracle) {
  const uint64_t seed = Seed();
  SCOPED_TRACE("KVRELAY_SEED=" + std::to_string(seed));
  std::mt19937_64 random(seed);
  constexpr uint32_t kDims[] = {16, 64, 80, 128, 256};
  constexpr uint32_t kGroups[] = {1, 2, 3, 4, 8};
  constexpr uint32_t kBlockSizes[] = {8, 16, 32};
  for (int round = 0; round < 12; ++round) {
    CacheShape shape;
    DrawNumbers(shape, random);
    shape.format = random() % 2 == 0 ? KvFormat::kNhd : KvFormat::kHnd;
    shape.kv_heads = static_cast<uint32_t>(1 + random() % 2);
    shape.head_dim = kDims[random() % std::size(kDims)];
    shape.block_size = kBlockSizes[random() % std::size(kBlockSizes)];
    shape.num_blocks = 2048 / shape.block_size;
    const uint32_t group = kGroups[random() % std::size(kGroups)];
    PagedCase test(shape, random());
    for (uint32_t shared = 0; shared < 2; ++shared) {
      const auto& prefix = test.AddPrefix(test.Uniform(1, 256 / shape.block_size));
      const auto tokens = static_cast<uint32_t>(prefix.size() * shape.block_size);
      const uint32_t sharers = test.Uniform(1, 5);
      for (uint32_t i = 0; i < sharers; ++i) {
        const uint32_t own = test.Uniform(1, 40);
        test.AddSequence(i % 2 == 0 ? 1 : test.Uniform(1, own), tokens + own, &prefix);
      }
      test.AddSequence(1, test.Uniform(1, 100));
    }
    SCOPED_TRACE("round " + std::to_string(round) + ": " + shape.ToString() + ", group " +
                 std::to_string(group));
    const Batch batch{test.sequences(), shape.kv_heads * group, Scale(shape.head_dim)};
    const auto q = RandomQuery(test.rows(), batch.query_heads, shape.head_dim, test.random());
    const Output relay = RunRelay(test, batch, {}, 0, q);
    ExpectNear(RunPaged(test, batch, 0, q), relay, 1e-5F);
    ExpectNear(RunNaive(test, batch, 0, q), relay, 1e-5F);
    if (HasFatalFailure()) return;
  }
}

// Trees of shared prefixes: roots, branches and leaves of random lengths, sequences that end at any
// of them, rows inside the shared part, windows that end anywhere.
TEST(RelayAttention, RandomTreesEqualPagedAndTheOracle) {
  const uint64_t seed = Seed();
  SCOPED_TRACE("KVRELAY_SEED=" + std::to_string(seed));
  std::mt19937_64 random(seed);
  constexpr uint32_t kWindows[] = {0, 0, 1, 20, 100};
  for (int round = 0; round < 12; ++round) {
    CacheShape shape;
    DrawNumbers(shape, random);
    shape.kv_heads = static_cast<uint32_t>(1 + random() % 2);
    shape.head_dim = random() % 2 == 0 ? 64 : 24;
    shape.block_size = 8;
    shape.num_blocks = 1024;
    PagedCase test(shape, random());
    std::vector<const std::vector<BlockId>*> nodes = {nullptr};
    for (uint32_t i = 0; i < 12; ++i) {
      nodes.push_back(&test.AddPrefix(test.Uniform(1, 9), nodes[random() % nodes.size()]));
    }
    for (uint32_t i = 0; i < 40; ++i) {
      const auto* prefix = nodes[random() % nodes.size()];
      const auto tokens =
          static_cast<uint32_t>(prefix == nullptr ? 0 : prefix->size() * shape.block_size);
      const uint32_t context = tokens + test.Uniform(tokens == 0 ? 1 : 0, 40);
      test.AddSequence(i % 4 == 0 ? test.Uniform(1, std::min(context, 30U)) : 1, context, prefix);
    }
    const uint32_t query_heads = shape.kv_heads * static_cast<uint32_t>(1 + random() % 4);
    const Batch batch{test.sequences(),
                      query_heads,
                      Scale(shape.head_dim),
                      {.window = kWindows[random() % std::size(kWindows)]}};
    SCOPED_TRACE("round " + std::to_string(round) + ": " + shape.ToString() + ", window " +
                 std::to_string(batch.kind.window) + "; " + PlanRelay(batch, {}).decision.why);
    const auto q = RandomQuery(test.rows(), query_heads, shape.head_dim, test.random());
    const Output want = RunNaive(test, batch, 0, q);
    for (const uint32_t min_sharers : {1U, 2U, 4U}) {
      ExpectNear(want, RunRelay(test, batch, {.min_sharers = min_sharers}, 0, q), 1e-5F);
    }
    ExpectNear(want, RunPaged(test, batch, 0, q), 1e-5F);
    if (HasFatalFailure()) return;
  }
}

TEST(RelayAttention, APromptThatIsThePrefixHasNoSuffix) {
  PagedCase test({.kv_heads = 2, .head_dim = 32}, 3);
  const auto& prefix = test.AddPrefix(5);
  test.AddSequence(1, 80, &prefix);  // its last token is recomputed; its K and V are the prefix's
  test.AddSequence(1, 90, &prefix);
  ASSERT_TRUE(test.sequences()[0].blocks.empty());
  const Batch batch{test.sequences(), 4, Scale(32)};
  ASSERT_TRUE(PlanRelay(batch, {}).decision.relay);
  const auto q = RandomQuery(test.rows(), 4, 32, test.random());
  ExpectNear(RunNaive(test, batch, 0, q), RunRelay(test, batch, {}, 0, q), 1e-5F);
}

// Rows that stand inside the prefix see only what is before them.
TEST(RelayAttention, RowsInsideThePrefixStayCausal) {
  PagedCase test({.kv_heads = 2, .head_dim = 32}, 4);
  const auto& prefix = test.AddPrefix(5);
  test.AddSequence(30, 100, &prefix);  // positions 70 to 99 of which 70 to 79 are in the prefix
  test.AddSequence(20, 60, &prefix);   // all inside
  test.AddSequence(1, 101, &prefix);
  const Batch batch{test.sequences(), 4, Scale(32)};
  ASSERT_TRUE(PlanRelay(batch, {}).decision.relay);
  const auto q = RandomQuery(test.rows(), 4, 32, test.random());
  ExpectNear(RunNaive(test, batch, 0, q), RunRelay(test, batch, {}, 0, q), 1e-5F);
}

TEST(RelayAttention, WithoutGroupsItIsPagedBitForBit) {
  PagedCase test({.kv_heads = 2, .head_dim = 64}, 5);
  const auto& prefix = test.AddPrefix(4);
  test.AddSequence(1, 70, &prefix);
  test.AddSequence(9, 90);
  const Batch batch{test.sequences(), 8, Scale(64)};
  const auto q = RandomQuery(test.rows(), 8, 64, test.random());
  ExpectSameBits(RunPaged(test, batch, 0, q), RunRelay(test, batch, {}, 0, q));
}

TEST(RelayAttention, ThreadsDoNotChangeBits) {
  PagedCase test({.kv_heads = 2, .head_dim = 64, .num_blocks = 512}, 6);
  const auto& prefix = test.AddPrefix(70);
  for (uint32_t i = 0; i < 70; ++i) test.AddSequence(1, 70 * 16 + 1 + i % 50, &prefix);
  const Batch batch{test.sequences(), 8, Scale(64)};
  const auto q = RandomQuery(test.rows(), 8, 64, test.random());
  const Output one = ExpectSameBitsOnThreads([&] { return RunRelay(test, batch, {}, 0, q); });
  ExpectNear(RunPaged(test, batch, 0, q), one, 1e-5F);
}

// Logits of 1e4 in one part and -1e4 in the other, both ways round: one side's weight vanishes
// without a NaN.
TEST(RelayAttention, OnePartOutweighsTheOtherCompletely) {
  for (const float sign : {1.0F, -1.0F}) {
    PagedCase test({.kv_heads = 1, .head_dim = 16}, 7);
    const std::vector<BlockId> prefix = test.AddPrefix(3);
    for (int i = 0; i < 3; ++i) test.AddSequence(1, 60, &prefix);
    for (uint32_t token = 0; token < 48; ++token) {
      for (uint32_t d = 0; d < 16; ++d) test.SetK(prefix, token, 0, d, d == 0 ? 100 * sign : 0);
    }
    for (const Sequence& sequence : test.sequences()) {
      const std::vector<BlockId> own(sequence.blocks.begin(), sequence.blocks.end());
      for (uint32_t token = 0; token < 12; ++token) {
        for (uint32_t d = 0; d < 16; ++d) test.SetK(own, token, 0, d, d == 0 ? -100 * sign : 0);
      }
    }
    const Batch batch{test.sequences(), 1, 1.0F};
    std::vector<float> q(3 * 16, 0.0F);
    for (size_t row = 0; row < 3; ++row) q[row * 16] = 100;
    ExpectNear(RunNaive(test, batch, 0, q), RunRelay(test, batch, {}, 0, q), 1e-5F);
  }
}

}  // namespace
}  // namespace kvrelay::attention
