// The innermost step of attention on the CPU: packed query rows of one KV head meet one tile of
// keys.
//
// Scores are Q * K^T and outputs P * V, each element summed over its depth in order, one key (or
// one dimension) after the other. A row's numbers therefore depend on its own query and keys only:
// not on the rows beside it, nor on how rows are packed. That makes a request's tokens the same
// alone and in any batch.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <string_view>
#include <utility>

#include "kvcache/layout.h"

namespace kvrelay::attention {

inline constexpr uint32_t kTileKeys = 64;

// Rows of accumulators are padded to whole vectors of the widest instruction set.
constexpr uint32_t PaddedDim(uint32_t head_dim) { return (head_dim + 15) / 16 * 16; }

// Up to kTileKeys keys at positions [first, first + count) of a key run, and where their K and V
// rows lie in the cache.
struct KeyTile {
  uint32_t first = 0;
  uint32_t count = 0;
  DType dtype = DType::kFp32;          // scales are not the tile's business
  const std::byte* k[kTileKeys] = {};  // plain arrays: see tile_kernel_avx2.cc
  const std::byte* v[kTileKeys] = {};
};

// Online-softmax state of `rows` packed query rows. Row r sees the keys at positions [begin[r],
// end[r]), none where that is empty; it has seen some of them already: acc = sum exp(logit - m) * v
// (padding stays zero), l = sum exp(logit - m), m = largest logit (-inf: none).
struct RowBlock {
  uint32_t rows = 0;
  uint32_t head_dim = 0;
  float scale = 1.0F;
  float soft_cap = 0;                 // as in AttentionKind
  const uint32_t* begin = nullptr;    // [rows]; null: all 0
  const uint32_t* end = nullptr;      // [rows]
  const float* slope = nullptr;       // [rows], of ALiBi; null: none
  const int32_t* position = nullptr;  // [rows], where each row stands; with `slope`
  const float* q = nullptr;           // [rows][head_dim]
  float* acc = nullptr;               // [rows][PaddedDim(head_dim)], 64-byte aligned
  float* m = nullptr;                 // [rows]
  float* l = nullptr;                 // [rows]
};

// Floats of scratch (64-byte aligned) that AttendTile needs.
constexpr size_t TileScratchFloats(uint32_t head_dim) {
  return size_t{kTileKeys} * (2 * size_t{PaddedDim(head_dim)} + 8);
}

// Adds a tile's keys to the state of the rows that see them. `next` is what comes after (or the
// tile itself): its rows are fetched ahead, none is read.
using AttendTileFn = void (*)(const KeyTile& tile, const KeyTile& next, const RowBlock& block,
                              float* scratch);

struct TileKernel {
  std::string_view name;  // "portable", "avx2", "avx512"
  AttendTileFn attend = nullptr;
};

// The fastest that this processor runs, chosen once. Kernels differ from each other within fp32
// rounding.
const TileKernel& BestTileKernel();
// Kernels that this processor runs, slowest first; for tests.
struct TileKernelList {
  std::array<TileKernel, 3> kernels;
  size_t count = 0;
};
TileKernelList UsableTileKernels();

void AttendTilePortable(const KeyTile& tile, const KeyTile& next, const RowBlock& block,
                        float* scratch);
#if defined(__x86_64__)
void AttendTileAvx2(const KeyTile& tile, const KeyTile& next, const RowBlock& block,
                    float* scratch);
void AttendTileAvx512(const KeyTile& tile, const KeyTile& next, const RowBlock& block,
                      float* scratch);
#endif

}  // namespace kvrelay::attention
