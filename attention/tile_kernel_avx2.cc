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

}  // namespace
}  // namespace kvrelay::attention

#include "attention/tile_kernel_body.inc"

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

#endif  // __x86_64__
