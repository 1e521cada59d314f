// Numbers of the cache's dtypes as bits, one at a time: what every executor's conversion has to
// equal bit by bit (of a NaN: to be a NaN).
//
// From fp32: to the nearest, ties to even. Saturating: beyond the largest finite value, infinities
// too, the largest finite value of that sign. A NaN stays one; in int8, which has none, it is 0.
// fp8_e4m3 has no infinities and one NaN (448 is its largest value); int8 is -128 to 127.
#pragma once

#include <bit>
#include <cstddef>
#include <cstdint>
#include <cstring>

#include "kvcache/layout.h"

namespace kvrelay {

// Branches are written as selections and no step can trap, so that loops over these become vector
// code; usable where the sanitizers must not look (copy_host.h).
#if defined(__CUDACC__)
#define KVRELAY_NUMBER __host__ __device__ static inline
#elif defined(__GNUC__)
#define KVRELAY_NUMBER __attribute__((no_sanitize("thread"), always_inline)) static inline
#else
#define KVRELAY_NUMBER static inline
#endif

// A floating point number of 1 + kExponent + kMantissa bits, narrower than fp32, with subnormals.
template <typename BitsType, int kExponent, int kMantissa, int32_t kMaxBits, int32_t kNan>
struct NarrowFloat {
  using Bits = BitsType;
  static constexpr int kBias = (1 << (kExponent - 1)) - 1;
  static constexpr int kDropped = 23 - kMantissa;
  static constexpr int kSign = kExponent + kMantissa;
  static constexpr int32_t kRebias = (127 - kBias) << 23;
  static constexpr int32_t kLeastNormal = kRebias + (1 << 23);  // as fp32
  static constexpr int32_t kLargest = (kMaxBits << kDropped) + kRebias;

  KVRELAY_NUMBER float ToFloat(Bits bits) {
    if constexpr (kExponent == 8) return std::bit_cast<float>(uint32_t{bits} << kDropped);
    const uint32_t sign = uint32_t{bits} >> kSign << 31;
    const auto magnitude = static_cast<int32_t>(bits & ((1U << kSign) - 1));
    // The format's infinity where it has one, else NaN.
    constexpr int32_t kInfinity = kMaxBits + 1 == kNan ? -1 : kMaxBits + 1;
    const int32_t special = magnitude == kInfinity ? 0x7f800000 : 0x7fc00000;
    int32_t value = (magnitude << kDropped) + kRebias;
    const float subnormal =
        static_cast<float>(magnitude) * std::bit_cast<float>(kLeastNormal - (kMantissa << 23));
    value = magnitude >> kMantissa == 0 ? std::bit_cast<int32_t>(subnormal) : value;
    value = magnitude > kMaxBits ? special : value;
    return std::bit_cast<float>(sign | static_cast<uint32_t>(value));
  }

  KVRELAY_NUMBER Bits FromFloat(float value) {
    const auto bits = std::bit_cast<int32_t>(value);
    const int32_t all = bits & 0x7fffffff;
    const int32_t magnitude = all < kLargest ? all : kLargest;
    const int32_t odd = (magnitude >> kDropped) & 1;
    int32_t rounded = (magnitude + (1 << (kDropped - 1)) - 1 + odd - kRebias) >> kDropped;
    if constexpr (kExponent < 8) {
      // Adding the power of two whose last place is our smallest step lets the adder round.
      constexpr int32_t kMagic = kLeastNormal + (kDropped << 23);
      const float sum = std::bit_cast<float>(magnitude) + std::bit_cast<float>(kMagic);
      const int32_t subnormal = std::bit_cast<int32_t>(sum) - kMagic;
      rounded = magnitude < kLeastNormal ? subnormal : rounded;
    }
    const int32_t sign = static_cast<int32_t>(static_cast<uint32_t>(bits) >> 31 << kSign);
    return static_cast<Bits>(all > 0x7f800000 ? kNan : sign | rounded);
  }
};

struct Fp32 {
  using Bits = uint32_t;
  KVRELAY_NUMBER float ToFloat(Bits bits) { return std::bit_cast<float>(bits); }
  KVRELAY_NUMBER Bits FromFloat(float value) {
    const auto bits = std::bit_cast<uint32_t>(value);
    return (bits & 0x7fffffffU) == 0x7f800000U ? bits - 1 : bits;
  }
};

struct Int8 {
  using Bits = uint8_t;
  KVRELAY_NUMBER float ToFloat(Bits bits) {
    return static_cast<float>(static_cast<int32_t>(static_cast<int8_t>(bits)));
  }
  KVRELAY_NUMBER Bits FromFloat(float value) {
    const bool is_nan = (std::bit_cast<int32_t>(value) & 0x7fffffff) > 0x7f800000;
    value = value < -128.0F ? -128.0F : value;
    value = value > 127.0F ? 127.0F : value;
    // Adding 1.5 * 2^23, whose last place is 1, lets the adder round.
    const int32_t rounded = std::bit_cast<int32_t>(value + 0x1.8p23F) - 0x4b400000;
    return static_cast<Bits>(is_nan ? 0 : rounded);
  }
};

using Fp16 = NarrowFloat<uint16_t, 5, 10, 0x7bff, 0x7fff>;
using Bf16 = NarrowFloat<uint16_t, 8, 7, 0x7f7f, 0x7fff>;
using Fp8E4m3 = NarrowFloat<uint8_t, 4, 3, 0x7e, 0x7f>;
using Fp8E5m2 = NarrowFloat<uint8_t, 5, 2, 0x7b, 0x7f>;

// Calls fn(Number()) with the type above that `dtype` is, and returns what it returns. `dtype`
// exists.
template <typename Fn>
static decltype(auto) WithNumber(DType dtype, Fn&& fn) {
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
