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

template <typename Bits>
inline IntVec LoadBits(const Bits* p) {
  return IntVec{p[0], p[1], p[2], p[3]};
}

// Widens a float of kMantissa bits of fraction, all of whose bits but the sign are below bit kSign:
// moves them into place and corrects the exponent with one exact multiplication (denormals come out
// right); from kSpecial on, infinities and NaNs, they get the largest exponent.
template <int kSign, int kMantissa, int32_t kSpecial>
inline Vec WidenFloat(IntVec bits) {
  constexpr int kShift = 23 - kMantissa;
  constexpr int kBias = (1 << (kSign - kMantissa - 1)) - 1;
  const Vec rebias = (Vec)(IntVec{} + ((254 - kBias) << 23));
  const IntVec magnitude = bits & ((1 << kSign) - 1);
  const IntVec finite = (IntVec)((Vec)(magnitude << kShift) * rebias);
  const IntVec special = magnitude >= kSpecial;
  const IntVec sign = (bits >> kSign) << 31;
  return (Vec)(sign | finite | (special & 0x7F800000));
}

inline Vec LoadFp16(const uint16_t* p) { return WidenFloat<15, 10, 0x7C00>(LoadBits(p)); }
inline Vec LoadFp8E4m3(const uint8_t* p) { return WidenFloat<7, 3, 0x7F>(LoadBits(p)); }
inline Vec LoadFp8E5m2(const uint8_t* p) { return WidenFloat<7, 2, 0x7C>(LoadBits(p)); }
inline Vec LoadInt8(const int8_t* p) { return __builtin_convertvector(LoadBits(p), Vec); }

inline Vec LoadBf16(const uint16_t* p) { return (Vec)(LoadBits(p) << 16); }

}  // namespace
}  // namespace kvrelay::attention

#include "attention/tile_kernel_body.inc"
