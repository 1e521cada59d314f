// Operations on vectors that the kernels are made of, in terms of the vector type that the
// including source file defines: Vec of kLanes floats, IntVec, Fma, LoadFp16, LoadBf16. Included
// once by each tile_kernel_*.cc, after its target pragma, so it has no include guard and calls no
// function of the standard library (see tile_kernel_avx2.cc).

namespace kvrelay::attention {
namespace {

using Lanes = std::make_integer_sequence<int, kLanes>;

inline Vec Splat(float x) { return Vec{} + x; }
inline Vec Load(const float* p) {
  Vec v;
  __builtin_memcpy(&v, p, sizeof(v));
  return v;
}
inline void Store(float* p, Vec v) { __builtin_memcpy(p, &v, sizeof(v)); }

// --- Rows of the cache, widened.

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

// Rows of a cache are too short and too scattered for the hardware to fetch ahead by itself.
template <DType kType>
inline void Prefetch(const std::byte* row, uint32_t index) {
  __builtin_prefetch(row + size_t{index} * (kType == DType::kFp32 ? 4 : 2));
}
// Lane i of the result is lane (i + kStep) % kLanes of `v`.
template <int kStep, int... kLane>
inline Vec Rotate(Vec v, std::integer_sequence<int, kLane...> /*lanes*/) {
  return __builtin_shufflevector(v, v, ((kLane + kStep) % kLanes)...);
}

// Exchanges the off-diagonal halves of each 2 kStep x 2 kStep square of two rows that are kStep
// apart.
template <int kStep, int... kLane>
inline void Exchange(Vec& upper, Vec& lower, std::integer_sequence<int, kLane...> /*lanes*/) {
  const Vec a = upper;
  const Vec b = lower;
  upper = __builtin_shufflevector(a, b, ((kLane & kStep) ? kLanes + kLane - kStep : kLane)...);
  lower = __builtin_shufflevector(a, b, ((kLane & kStep) ? kLanes + kLane : kLane + kStep)...);
}

template <int kStep>
inline void ExchangeAll(Vec (&rows)[kLanes]) {
#pragma GCC unroll 16
  for (int i = 0; i < kLanes; ++i) {
    if ((i & kStep) == 0) Exchange<kStep>(rows[i], rows[i + kStep], Lanes{});
  }
}

inline void Transpose(Vec (&rows)[kLanes]) {
  if constexpr (kLanes >= 16) ExchangeAll<8>(rows);
  if constexpr (kLanes >= 8) ExchangeAll<4>(rows);
  ExchangeAll<2>(rows);
  ExchangeAll<1>(rows);
}

// --- Reductions and exp.

template <int kStep>
inline void FoldMax(Vec& v) {
  const Vec turned = Rotate<kStep>(v, Lanes{});
  v = turned > v ? turned : v;
}
inline float LargestLane(Vec v) {
  if constexpr (kLanes >= 16) FoldMax<8>(v);
  if constexpr (kLanes >= 8) FoldMax<4>(v);
  FoldMax<2>(v);
  FoldMax<1>(v);
  return v[0];
}
inline float SumOfLanes(Vec v) {
  if constexpr (kLanes >= 16) v += Rotate<8>(v, Lanes{});
  if constexpr (kLanes >= 8) v += Rotate<4>(v, Lanes{});
  v += Rotate<2>(v, Lanes{});
  v += Rotate<1>(v, Lanes{});
  return v[0];
}

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

}  // namespace
}  // namespace kvrelay::attention
