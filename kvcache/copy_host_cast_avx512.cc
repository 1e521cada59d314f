// AVX-512 (F, BW, DQ, VL). Everything after the pragma may only run where HasAvx512(), and has
// internal linkage.
#if defined(__x86_64__)

#if defined(__GNUC__) && !defined(__clang__)
// GCC 12 reports the "undefined" operand inside its own intrinsics.
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"
#endif
#include <immintrin.h>

#include <type_traits>

#include "kvcache/copy_host_cast.h"

#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,f16c")

#include "kvcache/copy_host_cast_one.h"

#define KVRELAY_CONVERT ConvertAvx512

namespace kvrelay::internal {
namespace {

constexpr uint64_t kLanes = 16;
using Vec [[gnu::vector_size(64)]] = float;
using IntVec [[gnu::vector_size(64)]] = int32_t;
using HalfVec [[gnu::vector_size(32)]] = uint16_t;

// The second operand where it is a NaN.
KVRELAY_NUMBER Vec MinOrNan(Vec limit, Vec v) { return _mm512_min_ps(limit, v); }
KVRELAY_NUMBER Vec MaxOrNan(Vec limit, Vec v) { return _mm512_max_ps(limit, v); }
KVRELAY_NUMBER IntVec MinInt(IntVec a, IntVec b) {
  return (IntVec)_mm512_min_epi32((__m512i)a, (__m512i)b);
}
KVRELAY_NUMBER IntVec MaxInt(IntVec a, IntVec b) {
  return (IntVec)_mm512_max_epi32((__m512i)a, (__m512i)b);
}
KVRELAY_NUMBER IntVec Round(Vec v) { return (IntVec)_mm512_cvtps_epi32(v); }
KVRELAY_NUMBER Vec FromHalf(HalfVec v) { return _mm512_cvtph_ps((__m256i)v); }
KVRELAY_NUMBER HalfVec ToHalf(Vec v) {
  return (HalfVec)_mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
KVRELAY_NUMBER Vec FromInt(IntVec v) { return _mm512_cvtepi32_ps((__m512i)v); }
// `v`, and `nan` where `value` is one.
KVRELAY_NUMBER IntVec UnlessNan(Vec value, IntVec v, IntVec nan) {
  const __mmask16 is_nan = _mm512_cmp_ps_mask(value, value, _CMP_UNORD_Q);
  return (IntVec)_mm512_mask_mov_epi32((__m512i)v, is_nan, (__m512i)nan);
}
KVRELAY_NUMBER Vec NanBeyond(Vec v, float largest) {
  const __mmask16 beyond =
      _mm512_cmp_ps_mask(_mm512_abs_ps(v), _mm512_set1_ps(largest), _CMP_GT_OQ);
  return _mm512_mask_mov_ps(v, beyond, _mm512_set1_ps(__builtin_nanf("")));
}
KVRELAY_NUMBER IntVec WidenBytes(const std::byte* src) {
  return (IntVec)_mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i_u*>(src)));
}
KVRELAY_NUMBER IntVec WidenHalves(const std::byte* src) {
  return (IntVec)_mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i_u*>(src)));
}
KVRELAY_NUMBER HalfVec BytesAsHalves(const std::byte* src) {
  return (HalfVec)_mm256_cvtepu8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i_u*>(src)));
}
// The lower 8 or 16 bits of each; they hold all of a number.
KVRELAY_NUMBER void StoreBytes(std::byte* dst, IntVec v) {
  _mm_storeu_si128(reinterpret_cast<__m128i_u*>(dst), _mm512_cvtepi32_epi8((__m512i)v));
}
KVRELAY_NUMBER void StoreHalves(std::byte* dst, IntVec v) {
  _mm256_storeu_si256(reinterpret_cast<__m256i_u*>(dst), _mm512_cvtepi32_epi16((__m512i)v));
}

}  // namespace
}  // namespace kvrelay::internal

#include "kvcache/copy_host_cast_vectors.inc"

#pragma GCC pop_options
#endif
