// One AttendTile function on the vectors of tile_kernel_vectors.h. Included once by each
// tile_kernel_*.cc, like that one, and needs kPanelVecs and KVRELAY_ATTEND_TILE too.
//
// Two ways to the same bits: few rows (decode) take K and V straight from the cache; many rows
// share a packed fp32 copy of the tile, K transposed.

#include "attention/tile_kernel_vectors.h"

namespace kvrelay::attention {
namespace {

// kStripRows x kPanelVecs accumulators fill the registers of each instruction set.
constexpr int kStripRows = 6;
constexpr float kNegInf = -__builtin_inff();

constexpr uint32_t WholeVectors(uint32_t floats) { return (floats + kLanes - 1) / kLanes * kLanes; }

// --- The packed tile.

// The K rows of kLanes keys from `key` on; past the tile's end the last key again.
struct KeyRows {
  const std::byte* row[kLanes];

  KeyRows(const KeyTile& tile, uint32_t key) {
    for (uint32_t i = 0; i < kLanes; ++i) {
      row[i] = tile.k[key + i < tile.count ? key + i : tile.count - 1];
    }
  }

  // Dimensions d, d + 1, ... of these keys, one vector each.
  template <DType kType>
  void LoadColumns(uint32_t d, uint32_t dim, Vec (&columns)[kLanes]) const {
    if (d + kLanes <= dim) {
#pragma GCC unroll 16
      for (int i = 0; i < kLanes; ++i) columns[i] = LoadRow<kType>(row[i], d);
    } else {
      for (int i = 0; i < kLanes; ++i) columns[i] = LoadRowTail<kType>(row[i], d, dim - d);
    }
    Transpose(columns);
  }
};

// While K of a tile is read, its V is fetched ahead; while V is read, the next tile's K.
template <DType kType>
inline void PrefetchValues(const KeyTile& tile, uint32_t key, uint32_t d) {
#pragma GCC unroll 16
  for (int i = 0; i < kLanes; ++i) Prefetch<kType>(tile.v[key + i], d);
}

// K to kt[dimension][key of tile].
template <DType kType>
void PackK(const KeyTile& tile, uint32_t dim, float* kt) {
  for (uint32_t key = 0; key < tile.count; key += kLanes) {
    const KeyRows keys(tile, key);
    for (uint32_t d = 0; d < dim; d += kLanes) {
      PrefetchValues<kType>(tile, key, d);
      Vec columns[kLanes];
      keys.LoadColumns<kType>(d, dim, columns);
#pragma GCC unroll 16
      for (int i = 0; i < kLanes; ++i) Store(kt + size_t{d + i} * kTileKeys + key, columns[i]);
    }
  }
}

// V to v[key of tile][padded dimension].
template <DType kType>
void PackV(const KeyTile& tile, const KeyTile& next, uint32_t dim, float* v) {
  const uint32_t padded = PaddedDim(dim);
  for (uint32_t key = 0; key < tile.count; ++key) {
    float* row = v + size_t{key} * padded;
    uint32_t d = 0;
    for (; d + kLanes <= dim; d += kLanes) {
      Prefetch<kType>(next.k[key], d);
      Store(row + d, LoadRow<kType>(tile.v[key], d));
    }
    if (d < dim) Store(row + d, LoadRowTail<kType>(tile.v[key], d, dim - d));
    for (d = WholeVectors(dim); d < padded; d += kLanes) Store(row + d, Vec{});
  }
}

// --- Products: each element is summed over its depth in order, one fused multiply-add a step.

// Right-hand sides of Panel: At(k, i) is the i-th vector of the panel's columns in row k.
struct PackedColumns {
  const float* first;
  size_t stride;
  Vec At(uint32_t k, int i) const { return Load(first + k * stride + i * kLanes); }
};
template <DType kType>
struct CacheColumns {
  const std::byte* const* rows;
  const std::byte* const* prefetch;
  uint32_t first;
  Vec At(uint32_t k, int i) const {
    Prefetch<kType>(prefetch[k], first + i * kLanes);
    return LoadRow<kType>(rows[k], first + i * kLanes);
  }
};
template <DType kType>
struct CacheTail {
  const std::byte* const* rows;
  uint32_t first;
  uint32_t count;
  Vec At(uint32_t k, int /*i*/) const { return LoadRowTail<kType>(rows[k], first, count); }
};

// c[r][...] (+)= sum over k of a[r][k] * b[k][...], for kRows rows and kVecs vectors of columns.
template <int kRows, int kVecs, bool kAdd, typename Columns>
inline void Panel(const float* a, size_t lda, const Columns& b, uint32_t depth, float* c,
                  size_t ldc) {
  Vec sum[kRows][kVecs];
#pragma GCC unroll 6
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
    for (int i = 0; i < kVecs; ++i) sum[r][i] = kAdd ? Load(c + r * ldc + i * kLanes) : Vec{};
  }
  for (uint32_t k = 0; k < depth; ++k) {
    Vec row[kVecs];
#pragma GCC unroll 4
    for (int i = 0; i < kVecs; ++i) row[i] = b.At(k, i);
#pragma GCC unroll 6
    for (int r = 0; r < kRows; ++r) {
      const Vec x = Splat(a[r * lda + k]);
#pragma GCC unroll 4
      for (int i = 0; i < kVecs; ++i) sum[r][i] = Fma(x, row[i], sum[r][i]);
    }
  }
#pragma GCC unroll 6
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
    for (int i = 0; i < kVecs; ++i) Store(c + r * ldc + i * kLanes, sum[r][i]);
  }
}

// Scores of kRows rows with the first `columns` keys of a tile, and V weighed by these scores. The
// two ways to read the tile.
struct PackedTile {
  const float* kt;
  const float* v;
  uint32_t dim;
  uint32_t padded;

  template <int kRows>
  void Scores(const float* q, uint32_t columns, float* scores) const {
    uint32_t key = 0;
    for (; key + kPanelVecs * kLanes <= columns; key += kPanelVecs * kLanes) {
      Panel<kRows, kPanelVecs, false>(q, dim, PackedColumns{kt + key, kTileKeys}, dim, scores + key,
                                      kTileKeys);
    }
    for (; key < columns; key += kLanes) {
      Panel<kRows, 1, false>(q, dim, PackedColumns{kt + key, kTileKeys}, dim, scores + key,
                             kTileKeys);
    }
  }

  template <int kRows>
  void AddValues(const float* weights, uint32_t first, uint32_t end, float* acc) const {
    const float* a = weights + first;
    const float* b = v + size_t{first} * padded;
    uint32_t d = 0;
    for (; d + kPanelVecs * kLanes <= padded; d += kPanelVecs * kLanes) {
      Panel<kRows, kPanelVecs, true>(a, kTileKeys, PackedColumns{b + d, padded}, end - first,
                                     acc + d, padded);
    }
    for (; d < padded; d += kLanes) {
      Panel<kRows, 1, true>(a, kTileKeys, PackedColumns{b + d, padded}, end - first, acc + d,
                            padded);
    }
  }
};

template <DType kType>
struct CacheTile {
  const KeyTile& tile;
  const KeyTile& next;
  uint32_t dim;
  uint32_t padded;

  template <int kRows>
  void Scores(const float* q, uint32_t columns, float* scores) const {
    for (uint32_t key = 0; key < columns; key += kLanes) {
      const KeyRows keys(tile, key);
      Vec sum[kRows] = {};
      uint32_t d = 0;
      for (; d + kLanes <= dim; d += kLanes) {
        PrefetchValues<kType>(tile, key, d);
        Vec column[kLanes];
        keys.LoadColumns<kType>(d, dim, column);
#pragma GCC unroll 16
        for (int i = 0; i < kLanes; ++i) {
#pragma GCC unroll 6
          for (int r = 0; r < kRows; ++r) {
            sum[r] = Fma(Splat(q[size_t{dim} * r + d + i]), column[i], sum[r]);
          }
        }
      }
      if (d < dim) {
        Vec column[kLanes];
        keys.LoadColumns<kType>(d, dim, column);
        for (uint32_t i = 0; i < dim - d; ++i) {
          for (int r = 0; r < kRows; ++r) {
            sum[r] = Fma(Splat(q[size_t{dim} * r + d + i]), column[i], sum[r]);
          }
        }
      }
#pragma GCC unroll 6
      for (int r = 0; r < kRows; ++r) Store(scores + r * kTileKeys + key, sum[r]);
    }
  }

  template <int kRows>
  void AddValues(const float* weights, uint32_t first, uint32_t end, float* acc) const {
    const float* a = weights + first;
    const uint32_t depth = end - first;
    uint32_t d = 0;
    for (; d + kPanelVecs * kLanes <= dim; d += kPanelVecs * kLanes) {
      Panel<kRows, kPanelVecs, true>(a, kTileKeys,
                                     CacheColumns<kType>{tile.v + first, next.k + first, d}, depth,
                                     acc + d, padded);
    }
    for (; d + kLanes <= dim; d += kLanes) {
      Panel<kRows, 1, true>(a, kTileKeys, CacheColumns<kType>{tile.v + first, next.k + first, d},
                            depth, acc + d, padded);
    }
    if (d < dim) {
      Panel<kRows, 1, true>(a, kTileKeys, CacheTail<kType>{tile.v + first, d, dim - d}, depth,
                            acc + d, padded);
    }
  }
};

// --- Softmax.

// Turns the dot products of one row with `visible` keys into weights exp(logit - m), zero in the
// rest of `columns`, and brings the row's state to the new maximum. Not inlined: one body, so that
// all rows are rounded alike.
[[gnu::noinline]] void SoftmaxRow(float* scores, uint32_t visible, uint32_t columns, float scale,
                                  float* acc, uint32_t padded_dim, float* m, float* l) {
  for (uint32_t j = 0; j < columns; j += kLanes) Store(scores + j, Load(scores + j) * scale);
  for (uint32_t j = visible; j < columns; ++j) scores[j] = kNegInf;
  Vec largest = Splat(*m);
  for (uint32_t j = 0; j < columns; j += kLanes) {
    const Vec s = Load(scores + j);
    largest = s > largest ? s : largest;
  }
  const float m_new = LargestLane(largest);

  // All logits -inf: any finite base gives weights of zero, where -inf - -inf would give NaN.
  const float base = m_new == kNegInf ? 0.0F : m_new;
  Vec sum = {};
  for (uint32_t j = 0; j < columns; j += kLanes) {
    const Vec p = ExpNonPositive(Load(scores + j) - base);
    Store(scores + j, p);
    sum += p;
  }
  const float shrink = ExpNonPositive(Splat(*m - base))[0];
  *l = *l * shrink + SumOfLanes(sum);
  *m = m_new;
  if (shrink != 1.0F) {
    for (uint32_t d = 0; d < padded_dim; d += kLanes) Store(acc + d, Load(acc + d) * shrink);
  }
}

// kRows rows from `first_row` on.
template <int kRows, typename Tile>
void AttendStrip(const KeyTile& keys, const Tile& tile, const RowBlock& block, uint32_t first_row,
                 float* weights) {
  uint32_t visible[kRows];
  uint32_t most = 0;
  uint32_t least = kTileKeys;
  for (uint32_t r = 0; r < kRows; ++r) {
    const uint32_t end = block.visible[first_row + r];
    const uint32_t past = end > keys.first ? end - keys.first : 0;
    visible[r] = past < keys.count ? past : keys.count;
    most = visible[r] > most ? visible[r] : most;
    least = visible[r] < least ? visible[r] : least;
  }
  if (most == 0) return;

  const uint32_t columns = WholeVectors(most);
  const uint32_t padded = tile.padded;
  float* acc = block.acc + size_t{first_row} * padded;
  tile.template Scores<kRows>(block.q + size_t{first_row} * tile.dim, columns, weights);
  for (uint32_t r = 0; r < kRows; ++r) {
    if (visible[r] == 0) continue;
    SoftmaxRow(weights + r * kTileKeys, visible[r], columns, block.scale, acc + r * padded, padded,
               block.m + first_row + r, block.l + first_row + r);
  }
  // Keys that all rows see together, then each row's own: a value that a row may not see (perhaps
  // infinite, perhaps never written) does not even meet its zero weight.
  if (least > 0) tile.template AddValues<kRows>(weights, 0, least, acc);
  for (uint32_t r = 0; r < kRows; ++r) {
    if (visible[r] == least) continue;
    tile.template AddValues<1>(weights + r * kTileKeys, least, visible[r], acc + r * padded);
  }
}

template <typename Tile>
void AttendStripOf(uint32_t rows, const KeyTile& keys, const Tile& tile, const RowBlock& block,
                   uint32_t first_row, float* weights) {
  switch (rows) {
    case 1:
      return AttendStrip<1>(keys, tile, block, first_row, weights);
    case 2:
      return AttendStrip<2>(keys, tile, block, first_row, weights);
    case 3:
      return AttendStrip<3>(keys, tile, block, first_row, weights);
    case 4:
      return AttendStrip<4>(keys, tile, block, first_row, weights);
    case 5:
      return AttendStrip<5>(keys, tile, block, first_row, weights);
    default:
      return AttendStrip<kStripRows>(keys, tile, block, first_row, weights);
  }
}

template <DType kType>
void AttendTileOf(const KeyTile& keys, const KeyTile& next, const RowBlock& block, float* scratch) {
  const uint32_t padded = PaddedDim(block.head_dim);
  float* kt = scratch;
  float* v = kt + size_t{kTileKeys} * padded;
  float* weights = v + size_t{kTileKeys} * padded;
  if (block.rows <= kStripRows) {
    const CacheTile<kType> tile{keys, next, block.head_dim, padded};
    return AttendStripOf(block.rows, keys, tile, block, 0, weights);
  }
  PackK<kType>(keys, block.head_dim, kt);
  PackV<kType>(keys, next, block.head_dim, v);
  const PackedTile tile{kt, v, block.head_dim, padded};
  for (uint32_t row = 0; row < block.rows; row += kStripRows) {
    const uint32_t left = block.rows - row;
    AttendStripOf(left < kStripRows ? left : kStripRows, keys, tile, block, row, weights);
  }
}

}  // namespace

void KVRELAY_ATTEND_TILE(const KeyTile& tile, const KeyTile& next, const RowBlock& block,
                         float* scratch) {
  switch (tile.dtype) {
    case DType::kFp32:
      return AttendTileOf<DType::kFp32>(tile, next, block, scratch);
    case DType::kFp16:
      return AttendTileOf<DType::kFp16>(tile, next, block, scratch);
    case DType::kBf16:
      return AttendTileOf<DType::kBf16>(tile, next, block, scratch);
  }
}

}  // namespace kvrelay::attention
