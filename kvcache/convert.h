// Numbers of the cache's dtypes as bits, one at a time: what every executor's conversion has to
// equal bit by bit (of a NaN: to be a NaN).
//
// From fp32: to the nearest, ties to even. Saturating: beyond the largest finite value, infinities
// too, the largest finite value of that sign. A NaN stays one; in int8, which has none, it is 0.
// fp8_e4m3 has no infinities and one NaN (448 is its largest value); int8 is -128 to 127.
#pragma once

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <limits>

#include "kvcache/layout.h"

namespace kvrelay {

// A floating point number of 1 + kExponent + kMantissa bits, narrower than fp32, with subnormals.
template <typename BitsType, int kExponent, int kMantissa, uint32_t kMaxBits, uint32_t kNan>
struct NarrowFloat {
  using Bits = BitsType;
  static constexpr int kBias = (1 << (kExponent - 1)) - 1;
  static constexpr int kDropped = 23 - kMantissa;
  static constexpr int kSign = kExponent + kMantissa;
  static constexpr uint32_t kRebias = static_cast<uint32_t>(127 - kBias) << 23;
  static constexpr uint32_t kLeastNormal = kRebias + (1U << 23);  // as fp32
  static constexpr uint32_t kLargest = (kMaxBits << kDropped) + kRebias;

  static float ToFloat(Bits bits) {
    const uint32_t sign = uint32_t{bits} >> kSign << 31;
    const uint32_t magnitude = bits & ((1U << kSign) - 1);
    if (magnitude > kMaxBits) {  // an infinity where the format has them, else NaN
      const bool infinite = kMaxBits + 1 == magnitude && kNan != magnitude;
      return std::bit_cast<float>(sign | (infinite ? 0x7f800000U : 0x7fc00000U));
    }
    if constexpr (kExponent == 8) return std::bit_cast<float>(sign | (magnitude << kDropped));
    if (magnitude >> kMantissa == 0) {
      const float value =
          static_cast<float>(magnitude) * std::bit_cast<float>(kLeastNormal - (kMantissa << 23));
      return std::bit_cast<float>(sign | std::bit_cast<uint32_t>(value));
    }
    return std::bit_cast<float>(sign | ((magnitude << kDropped) + kRebias));
  }

  static Bits FromFloat(float value) {
    const auto bits = std::bit_cast<uint32_t>(value);
    const uint32_t sign = bits >> 31 << kSign;
    uint32_t magnitude = bits & 0x7fffffffU;
    if (magnitude > 0x7f800000U) return static_cast<Bits>(kNan);
    magnitude = std::min(magnitude, kLargest);
    if (kExponent < 8 && magnitude < kLeastNormal) {
      // Adding the power of two whose last place is our smallest step lets the adder round.
      constexpr uint32_t kMagic = kLeastNormal + (static_cast<uint32_t>(kDropped) << 23);
      const float sum = std::bit_cast<float>(magnitude) + std::bit_cast<float>(kMagic);
      return static_cast<Bits>(sign | (std::bit_cast<uint32_t>(sum) - kMagic));
    }
    const uint32_t odd = (magnitude >> kDropped) & 1U;
    const uint32_t rounded = magnitude + (1U << (kDropped - 1)) - 1 + odd;
    return static_cast<Bits>(sign | ((rounded - kRebias) >> kDropped));
  }
};

struct Fp32 {
  using Bits = uint32_t;
  static float ToFloat(Bits bits) { return std::bit_cast<float>(bits); }
  static Bits FromFloat(float value) {
    constexpr float kLargest = std::numeric_limits<float>::max();
    if (std::isinf(value)) value = std::copysign(kLargest, value);
    return std::bit_cast<uint32_t>(value);
  }
};

struct Int8 {
  using Bits = uint8_t;
  static float ToFloat(Bits bits) { return static_cast<float>(static_cast<int8_t>(bits)); }
  static Bits FromFloat(float value) {
    if (std::isnan(value)) return 0;
    return static_cast<Bits>(
        static_cast<int8_t>(std::nearbyint(std::clamp(value, -128.0F, 127.0F))));
  }
};

using Fp16 = NarrowFloat<uint16_t, 5, 10, 0x7bff, 0x7fff>;
using Bf16 = NarrowFloat<uint16_t, 8, 7, 0x7f7f, 0x7fff>;
using Fp8E4m3 = NarrowFloat<uint8_t, 4, 3, 0x7e, 0x7f>;
using Fp8E5m2 = NarrowFloat<uint8_t, 5, 2, 0x7b, 0x7f>;

// Calls fn(Number()) with the type above that `dtype` is, and returns what it returns. `dtype`
// exists.
template <typename Fn>
decltype(auto) WithNumber(DType dtype, Fn&& fn) {
  switch (dtype) {
    case DType::kFp32:
      break;
    case DType::kFp16:
      return fn(Fp16());
    case DType::kBf16:
      return fn(Bf16());
    case DType::kFp8E4m3:
      return fn(Fp8E4m3());
    case DType::kFp8E5m2:
      return fn(Fp8E5m2());
    case DType::kInt8:
      return fn(Int8());
  }
  return fn(Fp32());
}

// to[i] = Round(float(from[i]) * factor), the product rounded to fp32. Any alignment; the
// definition of a cast, element by element.
inline void ConvertRun(DType from, const std::byte* src, DType to, std::byte* dst,
                       uint64_t elements, float factor) {
  WithNumber(from, [&](auto source) {
    WithNumber(to, [&](auto target) {
      using Source = decltype(source);
      using Target = decltype(target);
      for (uint64_t i = 0; i < elements; ++i) {
        typename Source::Bits in;
        std::memcpy(&in, src + i * sizeof(in), sizeof(in));
        const typename Target::Bits out = Target::FromFloat(Source::ToFloat(in) * factor);
        std::memcpy(dst + i * sizeof(out), &out, sizeof(out));
      }
    });
  });
}

}  // namespace kvrelay
