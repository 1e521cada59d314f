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

}  // namespace
}  // namespace kvrelay::attention

#include "attention/tile_kernel_body.inc"

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

#endif  // __x86_64__
