// AVX2 with FMA and F16C. Everything after the pragma may only run where HasAvx2(): it has internal
// linkage, and calls no inline function of another header that the linker could pick for the whole
// program.
#if defined(__x86_64__)

#include <immintrin.h>

#include "attention/tile_kernel.h"

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")
#endif

#define KVRELAY_ATTEND_TILE AttendTileAvx2

namespace kvrelay::attention {
namespace {

constexpr int kLanes = 8;
constexpr int kPanelVecs = 2;
using Vec [[gnu::vector_size(32)]] = float;
using IntVec [[gnu::vector_size(32)]] = int32_t;

inline Vec Fma(Vec a, Vec b, Vec c) { return _mm256_fmadd_ps(a, b, c); }

inline Vec LoadFp16(const uint16_t* p) {
  return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}

inline Vec LoadBf16(const uint16_t* p) {
  const __m128i half = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(half), 16));
}

// By way of fp16, whose exponent is one bit longer and based 8 higher; 0x7F is the type's NaN.
inline Vec LoadFp8E4m3(const uint8_t* p) {
  const __m128i bytes = _mm_cvtepi8_epi16(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
  const __m128i magnitude = _mm_and_si128(bytes, _mm_set1_epi16(0x7F));
  const __m128i sign = _mm_and_si128(bytes, _mm_set1_epi16(INT16_MIN));
  const __m128i nan =
      _mm_and_si128(_mm_cmpeq_epi16(magnitude, _mm_set1_epi16(0x7F)), _mm_set1_epi16(0x7C00));
  const __m128i half = _mm_or_si128(_mm_or_si128(_mm_slli_epi16(magnitude, 7), nan), sign);
  return _mm256_cvtph_ps(half) * 256.0F;
}

// The upper byte of an fp16.
inline Vec LoadFp8E5m2(const uint8_t* p) {
  const __m128i bytes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(p));
  return _mm256_cvtph_ps(_mm_unpacklo_epi8(_mm_setzero_si128(), bytes));
}

inline Vec LoadInt8(const int8_t* p) {
  const __m128i bytes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(p));
  return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(bytes));
}

}  // namespace
}  // namespace kvrelay::attention

#include "attention/tile_kernel_body.inc"

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

#endif  // __x86_64__
