// MLA: absorbed queries over a cache of one latent row per token.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>

#include "attention/widen.h"
#include "tests/attention/paged_case.h"

namespace kvrelay::attention {
namespace {

TEST(Mla, RandomBatchesEqualTheOracle) {
  const uint64_t seed = Seed();
  SCOPED_TRACE("KVRELAY_SEED=" + std::to_string(seed));
  std::mt19937_64 random(seed);
  struct Heads {
    uint32_t row;
    uint32_t count;
  };
  constexpr Heads kHeads[] = {{576, 16}, {72, 5}, {40, 128}};
  for (const Heads& heads : kHeads) {
    for (const DType dtype : {DType::kFp32, DType::kBf16, DType::kFp8E4m3, DType::kInt8}) {
      const CacheShape shape{.dtype = dtype,
                             .format = KvFormat::kMla,
                             .head_dim = heads.row,
                             .num_blocks = 128,
                             .scaled = SizeOf(dtype) == 1};
      SCOPED_TRACE(shape.ToString());
      PagedCase test(shape, random());
      const auto& prefix = test.AddPrefix(9);
      for (uint32_t i = 0; i < 3; ++i) {
        const uint32_t own = test.Uniform(1, 90);
        test.AddSequence(i == 0 ? std::min(own, 5U) : 1, 9 * 16 + own, &prefix);
      }
      test.AddSequence(1, 77);
      const Batch batch{test.sequences(), heads.count, Scale(heads.row)};
      const auto q = RandomQuery(test.rows(), heads.count, heads.row, test.random());
      const Output want = RunNaive(test, batch, 0, q);
      ExpectNear(want, RunPaged(test, batch, 0, q), 1e-5F);
      ExpectNear(want, RunRelay(test, batch, {}, 0, q), 1e-5F);
      if (HasFatalFailure()) return;
    }
  }
}

// One decoding row over `kContext` tokens, as the model defines it: every head's K and V expanded
// from the latent.
TEST(Mla, AbsorbedQueriesGiveWhatExpandedHeadsGive) {
  constexpr uint32_t kHeads = 3;
  constexpr uint32_t kLatent = 32;
  constexpr uint32_t kRope = 8;
  constexpr uint32_t kNope = 12;
  constexpr uint32_t kValue = 10;
  constexpr uint32_t kContext = 50;
  constexpr uint32_t kRow = kLatent + kRope;
  const CacheShape shape{.format = KvFormat::kMla, .head_dim = kRow};
  PagedCase test(shape, 5);
  test.AddSequence(1, kContext);
  const auto up_k = RandomQuery(kHeads, kNope, kLatent, test.random());   // [head][nope][latent]
  const auto up_v = RandomQuery(kHeads, kValue, kLatent, test.random());  // [head][value][latent]
  const auto q_nope = RandomQuery(1, kHeads, kNope, test.random());
  const auto q_rope = RandomQuery(1, kHeads, kRope, test.random());
  const float scale = Scale(kNope + kRope) / 10;

  std::vector<float> absorbed(kHeads * kRow, 0.0F);
  for (uint32_t h = 0; h < kHeads; ++h) {
    for (uint32_t n = 0; n < kNope; ++n) {
      for (uint32_t c = 0; c < kLatent; ++c) {
        absorbed[h * kRow + c] += q_nope[h * kNope + n] * up_k[(h * kNope + n) * kLatent + c];
      }
    }
    std::copy_n(q_rope.begin() + h * kRope, kRope, absorbed.begin() + h * kRow + kLatent);
  }
  const Output got = RunPaged(test, {test.sequences(), kHeads, scale}, 0, absorbed);

  const auto cached = [&](uint32_t token, uint32_t i) {
    const BlockId block = test.sequences()[0].blocks[token / shape.block_size];
    return double{Widen(shape.dtype, test.view().K(0, block, 0, token % shape.block_size), i)};
  };
  for (uint32_t h = 0; h < kHeads; ++h) {
    std::vector<double> sum(kValue, 0.0);
    double total = 0;
    for (uint32_t token = 0; token < kContext; ++token) {
      double dot = 0;
      for (uint32_t n = 0; n < kNope; ++n) {
        double k = 0;
        for (uint32_t c = 0; c < kLatent; ++c) {
          k += up_k[(h * kNope + n) * kLatent + c] * cached(token, c);
        }
        dot += q_nope[h * kNope + n] * k;
      }
      for (uint32_t r = 0; r < kRope; ++r)
        dot += q_rope[h * kRope + r] * cached(token, kLatent + r);
      const double weight = std::exp(dot * scale);
      total += weight;
      for (uint32_t v = 0; v < kValue; ++v) {
        for (uint32_t c = 0; c < kLatent; ++c) {
          sum[v] += weight * up_v[(h * kValue + v) * kLatent + c] * cached(token, c);
        }
      }
    }
    for (uint32_t v = 0; v < kValue; ++v) {
      double out = 0;
      for (uint32_t c = 0; c < kLatent; ++c) {
        out += up_v[(h * kValue + v) * kLatent + c] * double{got.out[h * kRow + c]};
      }
      EXPECT_NEAR(out, sum[v] / total, 1e-4) << "head " << h << ", element " << v;
    }
    EXPECT_NEAR(got.lse[h], std::log(total), 1e-4);
  }
}

}  // namespace
}  // namespace kvrelay::attention
