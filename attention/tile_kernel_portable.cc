// Plain vectors of four floats: runs on every processor that the compiler targets.
#include "attention/tile_kernel.h"

#define KVRELAY_ATTEND_TILE AttendTilePortable

namespace kvrelay::attention {
namespace {

constexpr int kLanes = 4;
constexpr int kPanelVecs = 2;
using Vec [[gnu::vector_size(16)]] = float;
using IntVec [[gnu::vector_size(16)]] = int32_t;

inline Vec Fma(Vec a, Vec b, Vec c) { return a * b + c; }

// Widens by moving the bits into place and correcting the exponent with one exact multiplication
// (denormals come out right); infinities and NaNs get the largest exponent.
inline Vec LoadFp16(const uint16_t* p) {
  const IntVec half = {p[0], p[1], p[2], p[3]};
  const IntVec magnitude = (half & 0x7FFF) << 13;
  const IntVec finite = (IntVec)((Vec)magnitude * 0x1p112F);
  const IntVec special = magnitude >= (0x7C00 << 13);
  return (Vec)(((half & 0x8000) << 16) | finite | (special & 0x7F800000));
}

inline Vec LoadBf16(const uint16_t* p) {
  const IntVec half = {p[0], p[1], p[2], p[3]};
  return (Vec)(half << 16);
}

}  // namespace
}  // namespace kvrelay::attention

#include "attention/tile_kernel_body.inc"
