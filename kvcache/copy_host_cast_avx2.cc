// AVX2 and F16C. Everything after the pragma may only run where HasAvx2(), and has internal
// linkage.
#if defined(__x86_64__)

#include <immintrin.h>

#include <type_traits>

#include "kvcache/copy_host_cast.h"

#pragma GCC push_options
#pragma GCC target("avx2,f16c")

#include "kvcache/copy_host_cast_one.h"

#define KVRELAY_CONVERT ConvertAvx2

namespace kvrelay::internal {
namespace {

constexpr uint64_t kLanes = 8;
using Vec [[gnu::vector_size(32)]] = float;
using IntVec [[gnu::vector_size(32)]] = int32_t;
using HalfVec [[gnu::vector_size(16)]] = uint16_t;

// The second operand where it is a NaN.
KVRELAY_NUMBER Vec MinOrNan(Vec limit, Vec v) { return _mm256_min_ps(limit, v); }
KVRELAY_NUMBER Vec MaxOrNan(Vec limit, Vec v) { return _mm256_max_ps(limit, v); }
KVRELAY_NUMBER IntVec MinInt(IntVec a, IntVec b) {
  return (IntVec)_mm256_min_epi32((__m256i)a, (__m256i)b);
}
KVRELAY_NUMBER IntVec MaxInt(IntVec a, IntVec b) {
  return (IntVec)_mm256_max_epi32((__m256i)a, (__m256i)b);
}
KVRELAY_NUMBER IntVec Round(Vec v) { return (IntVec)_mm256_cvtps_epi32(v); }
KVRELAY_NUMBER Vec FromHalf(HalfVec v) { return _mm256_cvtph_ps((__m128i)v); }
KVRELAY_NUMBER HalfVec ToHalf(Vec v) {
  return (HalfVec)_mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
KVRELAY_NUMBER Vec FromInt(IntVec v) { return _mm256_cvtepi32_ps((__m256i)v); }
// `v`, and `nan` where `value` is one.
KVRELAY_NUMBER IntVec UnlessNan(Vec value, IntVec v, IntVec nan) {
  const __m256i is_nan = _mm256_castps_si256(_mm256_cmp_ps(value, value, _CMP_UNORD_Q));
  return (IntVec)_mm256_blendv_epi8((__m256i)v, (__m256i)nan, is_nan);
}
KVRELAY_NUMBER Vec NanBeyond(Vec v, float largest) {
  const Vec magnitude = _mm256_andnot_ps(_mm256_set1_ps(-0.0F), v);
  const Vec beyond = _mm256_cmp_ps(magnitude, _mm256_set1_ps(largest), _CMP_GT_OQ);
  return _mm256_blendv_ps(v, _mm256_set1_ps(__builtin_nanf("")), beyond);
}
KVRELAY_NUMBER IntVec WidenBytes(const std::byte* src) {
  return (IntVec)_mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i_u*>(src)));
}
KVRELAY_NUMBER IntVec WidenHalves(const std::byte* src) {
  return (IntVec)_mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i_u*>(src)));
}
KVRELAY_NUMBER HalfVec BytesAsHalves(const std::byte* src) {
  return (HalfVec)_mm_cvtepu8_epi16(_mm_loadl_epi64(reinterpret_cast<const __m128i_u*>(src)));
}
// The lower 8 or 16 bits of each; they hold all of a number.
KVRELAY_NUMBER __m128i Halves(IntVec v) {
  const __m256i low = _mm256_and_si256((__m256i)v, _mm256_set1_epi32(0xffff));
  return _mm_packus_epi32(_mm256_castsi256_si128(low), _mm256_extracti128_si256(low, 1));
}
KVRELAY_NUMBER void StoreBytes(std::byte* dst, IntVec v) {
  const __m128i halves = Halves(v & 0xff);
  _mm_storel_epi64(reinterpret_cast<__m128i_u*>(dst), _mm_packus_epi16(halves, halves));
}
KVRELAY_NUMBER void StoreHalves(std::byte* dst, IntVec v) {
  _mm_storeu_si128(reinterpret_cast<__m128i_u*>(dst), Halves(v));
}

}  // namespace
}  // namespace kvrelay::internal

#include "kvcache/copy_host_cast_vectors.inc"

#pragma GCC pop_options
#endif
