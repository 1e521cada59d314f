// AVX-512 (F, BW, DQ, VL). Everything after the pragma may only run where HasAvx512(): it has
// internal linkage, and calls no inline function of another header that the linker could pick for
// the whole program.
#if defined(__x86_64__)

#include <immintrin.h>

#include "attention/tile_kernel.h"

#if defined(__clang__)
#pragma clang attribute push(                                                    \
    __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c"))), \
    apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")
#endif

#define KVRELAY_ATTEND_TILE AttendTileAvx512

namespace kvrelay::attention {
namespace {

constexpr int kLanes = 16;
constexpr int kPanelVecs = 4;
using Vec [[gnu::vector_size(64)]] = float;
using IntVec [[gnu::vector_size(64)]] = int32_t;

inline Vec Fma(Vec a, Vec b, Vec c) { return _mm512_fmadd_ps(a, b, c); }

// Forms with a mask, all ones: GCC 12 warns about its own header in the others (GCC bug 105593).
inline Vec LoadFp16(const uint16_t* p) {
  return _mm512_maskz_cvtph_ps(0xFFFF, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}

inline Vec LoadBf16(const uint16_t* p) {
  const __m256i half = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  return (Vec)((IntVec)_mm512_maskz_cvtepu16_epi32(0xFFFF, half) << 16);
}

// By way of fp16, whose exponent is one bit longer and based 8 higher; 0x7F is the type's NaN.
inline Vec LoadFp8E4m3(const uint8_t* p) {
  const __m256i bytes = _mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  const __m256i magnitude = _mm256_and_si256(bytes, _mm256_set1_epi16(0x7F));
  const __m256i sign = _mm256_and_si256(bytes, _mm256_set1_epi16(INT16_MIN));
  const __mmask16 nan = _mm256_cmpeq_epi16_mask(magnitude, _mm256_set1_epi16(0x7F));
  const __m256i shifted = _mm256_or_si256(_mm256_slli_epi16(magnitude, 7), sign);
  const __m256i half = _mm256_mask_mov_epi16(shifted, nan, _mm256_set1_epi16(0x7FFF));
  return _mm512_maskz_cvtph_ps(0xFFFF, half) * 256.0F;
}

// The upper byte of an fp16.
inline Vec LoadFp8E5m2(const uint8_t* p) {
  const __m256i bytes = _mm256_cvtepu8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  return _mm512_maskz_cvtph_ps(0xFFFF, _mm256_slli_epi16(bytes, 8));
}

inline Vec LoadInt8(const int8_t* p) {
  const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return _mm512_maskz_cvtepi32_ps(0xFFFF, _mm512_maskz_cvtepi8_epi32(0xFFFF, bytes));
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
