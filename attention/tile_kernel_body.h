// One AttendTile function, in terms of the vector type that the including source file defines: Vec
// of kLanes floats, IntVec, Fma, LoadFp16, kPanelVecs, KVRELAY_ATTEND_TILE. Included once by each
// tile_kernel_*.cc, after its target pragma, so it has no include guard and calls nothing of the
// standard library (see tile_kernel_avx2.cc).

namespace kvrelay::attention {
namespace {

// kStripRows x kPanelVecs accumulators fill the registers of each instruction set.
constexpr int kStripRows = 6;
constexpr float kNegInf = -__builtin_inff();

inline Vec Load(const float* p) {
  Vec v;
  __builtin_memcpy(&v, p, sizeof(v));
  return v;
}
inline void Store(float* p, Vec v) { __builtin_memcpy(p, &v, sizeof(v)); }
inline Vec Splat(float x) { return Vec{} + x; }

// --- Widening rows of the cache.

inline Vec LoadBf16(const uint16_t* p) {
  using HalfVec [[gnu::vector_size(kLanes * sizeof(uint16_t))]] = uint16_t;
  HalfVec half;
  __builtin_memcpy(&half, p, sizeof(half));
  return (Vec)(__builtin_convertvector(half, IntVec) << 16);
}

template <DType kType>
inline Vec LoadRow(const std::byte* row, uint32_t index) {
  if constexpr (kType == DType::kFp32) {
    return Load(reinterpret_cast<const float*>(row) + index);
  } else if constexpr (kType == DType::kFp16) {
    return LoadFp16(reinterpret_cast<const uint16_t*>(row) + index);
  } else {
    return LoadBf16(reinterpret_cast<const uint16_t*>(row) + index);
  }
}

// The last, partial vector of a row: never reads past it, pads with zeros.
template <DType kType>
inline Vec LoadRowTail(const std::byte* row, uint32_t index, uint32_t count) {
  constexpr uint32_t kBytes = kType == DType::kFp32 ? 4 : 2;
  alignas(64) std::byte padded[kLanes * kBytes] = {};
  __builtin_memcpy(padded, row + size_t{index} * kBytes, size_t{count} * kBytes);
  return LoadRow<kType>(padded, 0);
}

template <DType kType>
inline Vec LoadRowPadded(const std::byte* row, uint32_t index, uint32_t dim) {
  return index + kLanes <= dim ? LoadRow<kType>(row, index)
                               : LoadRowTail<kType>(row, index, dim - index);
}

// Exchanges the off-diagonal halves of each 2 kStep x 2 kStep square of two rows that are kStep
// apart.
template <int kStep, int... kLane>
inline void Exchange(Vec& upper, Vec& lower) {
  const Vec a = upper;
  const Vec b = lower;
  upper = __builtin_shufflevector(a, b, ((kLane & kStep) ? kLanes + kLane - kStep : kLane)...);
  lower = __builtin_shufflevector(a, b, ((kLane & kStep) ? kLanes + kLane : kLane + kStep)...);
}

template <int kStep>
inline void ExchangeAll(Vec (&rows)[kLanes]) {
#pragma GCC unroll 16
  for (int i = 0; i < kLanes; ++i) {
    if ((i & kStep) != 0) continue;
    if constexpr (kLanes == 16) {
      Exchange<kStep, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15>(rows[i],
                                                                            rows[i + kStep]);
    } else if constexpr (kLanes == 8) {
      Exchange<kStep, 0, 1, 2, 3, 4, 5, 6, 7>(rows[i], rows[i + kStep]);
    } else {
      Exchange<kStep, 0, 1, 2, 3>(rows[i], rows[i + kStep]);
    }
  }
}

inline void Transpose(Vec (&rows)[kLanes]) {
  if constexpr (kLanes >= 16) ExchangeAll<8>(rows);
  if constexpr (kLanes >= 8) ExchangeAll<4>(rows);
  ExchangeAll<2>(rows);
  ExchangeAll<1>(rows);
}

// K rows to kt[dimension][key of tile]; keys past the tile's count are zero up to a whole vector.
template <DType kType>
void PackK(const KeyTile& tile, uint32_t dim, float* kt) {
  for (uint32_t key = 0; key < tile.count; key += kLanes) {
    for (uint32_t d = 0; d < dim; d += kLanes) {
      Vec square[kLanes];
#pragma GCC unroll 16
      for (int i = 0; i < kLanes; ++i) {
        square[i] = key + i < tile.count ? LoadRowPadded<kType>(tile.k[key + i], d, dim) : Vec{};
      }
      Transpose(square);
#pragma GCC unroll 16
      for (int i = 0; i < kLanes; ++i) {
        Store(kt + size_t{d + i} * kTileKeys + key, square[i]);
      }
    }
  }
}

// V rows to v[key of tile][padded dimension].
template <DType kType>
void PackV(const KeyTile& tile, uint32_t dim, float* v) {
  const uint32_t padded = PaddedDim(dim);
  for (uint32_t key = 0; key < tile.count; ++key) {
    float* row = v + size_t{key} * padded;
    uint32_t d = 0;
    for (; d < dim; d += kLanes) Store(row + d, LoadRowPadded<kType>(tile.v[key], d, dim));
    for (; d < padded; d += kLanes) Store(row + d, Vec{});
  }
}

template <DType kType>
void Pack(const KeyTile& tile, uint32_t dim, float* kt, float* v) {
  PackK<kType>(tile, dim, kt);
  PackV<kType>(tile, dim, v);
}

// --- Products.

// c[r][...] (+)= sum over k of a[r][k] * b[k][...], for kRows rows and kVecs vectors of columns, k
// in order.
template <int kRows, int kVecs, bool kAdd>
inline void Panel(const float* a, size_t lda, const float* b, size_t ldb, uint32_t depth, float* c,
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
    for (int i = 0; i < kVecs; ++i) row[i] = Load(b + k * ldb + i * kLanes);
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

template <int kRows, bool kAdd>
void Product(const float* a, size_t lda, const float* b, size_t ldb, uint32_t depth, float* c,
             size_t ldc, uint32_t columns) {
  uint32_t col = 0;
  for (; col + kPanelVecs * kLanes <= columns; col += kPanelVecs * kLanes) {
    Panel<kRows, kPanelVecs, kAdd>(a, lda, b + col, ldb, depth, c + col, ldc);
  }
  for (; col < columns; col += kLanes) {
    Panel<kRows, 1, kAdd>(a, lda, b + col, ldb, depth, c + col, ldc);
  }
}

template <bool kAdd>
void ProductOfRows(uint32_t rows, const float* a, size_t lda, const float* b, size_t ldb,
                   uint32_t depth, float* c, size_t ldc, uint32_t columns) {
  switch (rows) {
    case 1:
      return Product<1, kAdd>(a, lda, b, ldb, depth, c, ldc, columns);
    case 2:
      return Product<2, kAdd>(a, lda, b, ldb, depth, c, ldc, columns);
    case 3:
      return Product<3, kAdd>(a, lda, b, ldb, depth, c, ldc, columns);
    case 4:
      return Product<4, kAdd>(a, lda, b, ldb, depth, c, ldc, columns);
    case 5:
      return Product<5, kAdd>(a, lda, b, ldb, depth, c, ldc, columns);
    default:
      return Product<6, kAdd>(a, lda, b, ldb, depth, c, ldc, columns);
  }
}

// --- Softmax.

// exp(x) for x <= 0 within 2 ulp; exactly 0 below the smallest normal result and for -inf; NaN
// stays NaN.
inline Vec ExpNonPositive(Vec x) {
  constexpr float kRound =
      12582912.0F;  // 1.5 * 2^23: adding it leaves the nearest integer in the low bits
  const Vec shifted = Fma(x, Splat(1.44269504F), Splat(kRound));
  const Vec n = shifted - kRound;
  Vec r = Fma(n, Splat(-0.693359375F), x);
  r = Fma(n, Splat(2.12194440e-4F), r);
  Vec p = Splat(1.9875691500e-4F);
  p = Fma(p, r, Splat(1.3981999507e-3F));
  p = Fma(p, r, Splat(8.3334519073e-3F));
  p = Fma(p, r, Splat(4.1665795894e-2F));
  p = Fma(p, r, Splat(1.6666665459e-1F));
  p = Fma(p, r, Splat(5.0000001201e-1F));
  p = Fma(p, r * r, r) + 1.0F;
  const IntVec power = ((IntVec)shifted - (IntVec)Splat(kRound) + 127) << 23;
  const IntVec vanishes = x < -87.3365F;
  return (Vec)((IntVec)(p * (Vec)power) & ~vanishes);
}

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
  float m_new = *m;
  for (int i = 0; i < kLanes; ++i) m_new = largest[i] > m_new ? largest[i] : m_new;

  // All logits -inf: any finite base gives weights of zero, where -inf - -inf would give NaN.
  const float base = m_new == kNegInf ? 0.0F : m_new;
  Vec sum = {};
  for (uint32_t j = 0; j < columns; j += kLanes) {
    const Vec p = ExpNonPositive(Load(scores + j) - base);
    Store(scores + j, p);
    sum += p;
  }
  float total = 0.0F;
  for (int i = 0; i < kLanes; ++i) total += sum[i];

  const float shrink = ExpNonPositive(Splat(*m - base))[0];
  *l = *l * shrink + total;
  *m = m_new;
  if (shrink != 1.0F) {
    for (uint32_t d = 0; d < padded_dim; d += kLanes) Store(acc + d, Load(acc + d) * shrink);
  }
}

void AttendStrip(const KeyTile& tile, const RowBlock& block, uint32_t first_row, const float* kt,
                 const float* v, float* weights) {
  const uint32_t padded = PaddedDim(block.head_dim);
  const uint32_t rows = block.rows - first_row < kStripRows ? block.rows - first_row : kStripRows;
  uint32_t visible[kStripRows];
  uint32_t most = 0;
  uint32_t least = kTileKeys;
  for (uint32_t r = 0; r < rows; ++r) {
    const uint32_t end = block.visible[first_row + r];
    const uint32_t past = end > tile.first ? end - tile.first : 0;
    visible[r] = past < tile.count ? past : tile.count;
    most = visible[r] > most ? visible[r] : most;
    least = visible[r] < least ? visible[r] : least;
  }
  if (most == 0) return;

  const uint32_t columns = (most + kLanes - 1) / kLanes * kLanes;
  ProductOfRows<false>(rows, block.q + size_t{first_row} * block.head_dim, block.head_dim, kt,
                       kTileKeys, block.head_dim, weights, kTileKeys, columns);
  float* acc = block.acc + size_t{first_row} * padded;
  for (uint32_t r = 0; r < rows; ++r) {
    if (visible[r] == 0) continue;
    SoftmaxRow(weights + r * kTileKeys, visible[r], columns, block.scale, acc + r * padded, padded,
               block.m + first_row + r, block.l + first_row + r);
  }
  // Keys that all rows see together, then each row's own: a value that a row may not see (perhaps
  // infinite, perhaps never written) does not even meet its zero weight.
  if (least > 0) {
    ProductOfRows<true>(rows, weights, kTileKeys, v, padded, least, acc, padded, padded);
  }
  for (uint32_t r = 0; r < rows; ++r) {
    if (visible[r] == least) continue;
    ProductOfRows<true>(1, weights + r * kTileKeys + least, kTileKeys, v + size_t{least} * padded,
                        padded, visible[r] - least, acc + r * padded, padded, padded);
  }
}

}  // namespace

void KVRELAY_ATTEND_TILE(const KeyTile& tile, const RowBlock& block, float* scratch) {
  const uint32_t padded = PaddedDim(block.head_dim);
  float* kt = scratch;
  float* v = kt + size_t{kTileKeys} * padded;
  float* weights = v + size_t{kTileKeys} * padded;
  switch (tile.dtype) {
    case DType::kFp32:
      Pack<DType::kFp32>(tile, block.head_dim, kt, v);
      break;
    case DType::kFp16:
      Pack<DType::kFp16>(tile, block.head_dim, kt, v);
      break;
    case DType::kBf16:
      Pack<DType::kBf16>(tile, block.head_dim, kt, v);
      break;
  }
  for (uint32_t row = 0; row < block.rows; row += kStripRows) {
    AttendStrip(tile, block, row, kt, v, weights);
  }
}

}  // namespace kvrelay::attention
