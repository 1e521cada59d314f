// Each kernel that this processor runs, directly: the rest of the tests see only the fastest.
#include "attention/tile_kernel.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>
#include <limits>
#include <memory>

#include "attention/scratch.h"
#include "attention/softmax_state.h"
#include "attention/widen.h"
#include "tests/attention/paged_case.h"

namespace kvrelay::attention {
namespace {

class TileKernelTest : public testing::TestWithParam<TileKernel> {};

std::vector<TileKernel> Kernels() {
  const TileKernelList list = UsableTileKernels();
  return {list.kernels.begin(), list.kernels.begin() + static_cast<ptrdiff_t>(list.count)};
}

// Rows that see different keys, some none, with and without window, soft cap and ALiBi, against
// fp64.
TEST_P(TileKernelTest, RandomTilesEqualTheOracle) {
  std::mt19937_64 random(Seed());
  SCOPED_TRACE("KVRELAY_SEED=" + std::to_string(Seed()));
  std::normal_distribution<float> normal;
  for (int round = 0; round < 60; ++round) {
    const auto dtype = static_cast<DType>(random() % 6);
    const auto dim = static_cast<uint32_t>(1 + random() % 100);
    const auto rows = static_cast<uint32_t>(1 + random() % 20);
    const auto count = static_cast<uint32_t>(1 + random() % kTileKeys);
    const uint32_t padded = PaddedDim(dim);
    // Each row in an allocation of exactly its size, so that a sanitizer sees reads past it.
    std::vector<std::unique_ptr<std::byte[]>> keys;
    KeyTile tile;
    tile.first = 128;
    tile.count = count;
    tile.dtype = dtype;
    for (uint32_t i = 0; i < 2 * count; ++i) {
      keys.push_back(std::make_unique<std::byte[]>(size_t{dim} * SizeOf(dtype)));
      for (uint32_t d = 0; d < dim; ++d) StoreElement(dtype, keys.back().get(), d, normal(random));
      (i % 2 == 0 ? tile.k : tile.v)[i / 2] = keys.back().get();
    }
    std::vector<float> q(size_t{rows} * dim);
    for (float& x : q) x = normal(random);
    std::vector<uint32_t> begin(rows);
    std::vector<uint32_t> end(rows);
    std::vector<float> slope(rows);
    std::vector<int32_t> position(rows);
    const auto around = [&] {
      return tile.first - 2 + static_cast<uint32_t>(random() % (count + 4));
    };
    for (uint32_t r = 0; r < rows; ++r) {
      end[r] = around();
      begin[r] = random() % 4 == 0 ? 0 : around();
      slope[r] = std::ldexp(1.0F, -static_cast<int>(random() % 9));
      position[r] = static_cast<int32_t>(end[r] + random() % 3) - 1;
    }
    const bool window = random() % 2 == 0;
    const bool alibi = random() % 2 == 0;
    const float soft_cap = random() % 2 == 0 ? 0.0F : 3.0F;

    Scratch memory;
    const auto state =
        SoftmaxState::In(memory.Reserve(SoftmaxState::Floats(rows, padded)), rows, padded);
    state.Clear();
    Scratch scratch;
    GetParam().attend(tile, tile,
                      {.rows = rows,
                       .head_dim = dim,
                       .scale = 0.25F,
                       .soft_cap = soft_cap,
                       .begin = window ? begin.data() : nullptr,
                       .end = end.data(),
                       .slope = alibi ? slope.data() : nullptr,
                       .position = position.data(),
                       .q = q.data(),
                       .acc = state.acc,
                       .m = state.m,
                       .l = state.l},
                      scratch.Reserve(TileScratchFloats(dim)));

    for (uint32_t r = 0; r < rows; ++r) {
      uint32_t sees = 0;
      std::vector<double> want(dim, 0.0);
      double total = 0;
      for (uint32_t i = 0; i < count; ++i) {
        const uint32_t key = tile.first + i;
        if (key >= end[r] || (window && key < begin[r])) continue;
        ++sees;
        double dot = 0;
        for (uint32_t d = 0; d < dim; ++d)
          dot += double{q[r * dim + d]} * Widen(dtype, tile.k[i], d);
        double logit = dot * 0.25;
        if (soft_cap != 0) logit = soft_cap * std::tanh(logit / soft_cap);
        if (alibi) logit += slope[r] * static_cast<double>(int64_t{key} - position[r]);
        const double weight = std::exp(logit);
        total += weight;
        for (uint32_t d = 0; d < dim; ++d) want[d] += weight * Widen(dtype, tile.v[i], d);
      }
      std::vector<float> out(dim);
      const float lse = state.Finish(r, dim, 1.0F, out.data());
      if (sees == 0) {
        EXPECT_EQ(lse, -std::numeric_limits<float>::infinity());
      } else {
        ASSERT_NEAR(lse, std::log(total), 1e-5) << "row " << r << " of round " << round;
      }
      for (uint32_t d = 0; d < dim; ++d) {
        ASSERT_NEAR(out[d], sees == 0 ? 0 : want[d] / total, 1e-5)
            << "row " << r << " of round " << round;
      }
    }
  }
}

// With a single key the output is its V row itself: all values that one or two bytes can hold, each
// exactly.
TEST_P(TileKernelTest, WidensEveryNumberExactly) {
  for (const DType dtype :
       {DType::kFp16, DType::kBf16, DType::kFp8E4m3, DType::kFp8E5m2, DType::kInt8}) {
    constexpr uint32_t kDim = 256;
    const std::vector<uint16_t> zeros(kDim);
    const std::vector<float> q(kDim);
    const uint32_t visible = 1;
    const uint32_t bytes = SizeOf(dtype);
    for (uint32_t first = 0; first < 1U << (8 * bytes); first += kDim) {
      std::vector<std::byte> values(size_t{kDim} * bytes);
      for (uint32_t d = 0; d < kDim; ++d) {
        const uint32_t bits = first + d;
        std::memcpy(values.data() + size_t{d} * bytes, &bits, bytes);  // little-endian
      }
      KeyTile tile;
      tile.count = 1;
      tile.dtype = dtype;
      tile.k[0] = reinterpret_cast<const std::byte*>(zeros.data());
      tile.v[0] = values.data();
      Scratch memory;
      const auto state = SoftmaxState::In(memory.Reserve(SoftmaxState::Floats(1, kDim)), 1, kDim);
      state.Clear();
      Scratch scratch;
      GetParam().attend(tile, tile,
                        {.rows = 1,
                         .head_dim = kDim,
                         .scale = 1.0F,
                         .end = &visible,
                         .q = q.data(),
                         .acc = state.acc,
                         .m = state.m,
                         .l = state.l},
                        scratch.Reserve(TileScratchFloats(kDim)));
      for (uint32_t d = 0; d < kDim; ++d) {
        const float want = Widen(dtype, tile.v[0], d);
        if (std::isnan(want)) {
          ASSERT_TRUE(std::isnan(state.acc[d])) << DTypeName(dtype) << " bits " << first + d;
        } else {
          ASSERT_EQ(state.acc[d], want) << DTypeName(dtype) << " bits " << first + d;
        }
      }
    }
  }
}

// exp over its whole range, read off the sum of weights of two keys: logits 0 and -x.
TEST_P(TileKernelTest, WeightsAreExponentialsDownToTheSmallest) {
  const std::vector<float> k0 = {0.0F};
  const std::vector<float> v0 = {0.0F};
  const std::vector<float> v1 = {1.0F};
  const float q = 1.0F;
  const uint32_t visible = 2;
  for (float x = 0; x < 95; x += 0.0173F) {
    const float k1 = -x;
    KeyTile tile;
    tile.count = 2;
    tile.k[0] = reinterpret_cast<const std::byte*>(k0.data());
    tile.k[1] = reinterpret_cast<const std::byte*>(&k1);
    tile.v[0] = reinterpret_cast<const std::byte*>(v0.data());
    tile.v[1] = reinterpret_cast<const std::byte*>(v1.data());
    Scratch memory;
    const auto state = SoftmaxState::In(memory.Reserve(SoftmaxState::Floats(1, 16)), 1, 16);
    state.Clear();
    Scratch scratch;
    GetParam().attend(tile, tile,
                      {.rows = 1,
                       .head_dim = 1,
                       .scale = 1.0F,
                       .end = &visible,
                       .q = &q,
                       .acc = state.acc,
                       .m = state.m,
                       .l = state.l},
                      scratch.Reserve(TileScratchFloats(1)));
    const double want = std::exp(static_cast<double>(-x));
    if (x < 87.3F) {
      ASSERT_NEAR(state.acc[0] / want, 1.0, 3e-7) << "exp(" << -x << ")";
    } else {
      ASSERT_LE(state.acc[0], 1.2e-38F) << "exp(" << -x << ")";
    }
    ASSERT_NEAR(state.l[0], 1.0 + want, 2e-7);
  }
}

INSTANTIATE_TEST_SUITE_P(Kernels, TileKernelTest, testing::ValuesIn(Kernels()),
                         [](const auto& info) { return std::string(info.param.name); });

}  // namespace
}  // namespace kvrelay::attention
