// One element of a cache row as a float. The plain way; kernels widen whole vectors.
#pragma once

#include <bit>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <limits>

#include "kvcache/layout.h"

namespace kvrelay::attention {

inline float WidenFp16(uint16_t half) {
  const int exponent = (half >> 10) & 31;
  const int fraction = half & 1023;
  float magnitude = 0;
  if (exponent == 31) {
    magnitude = fraction == 0 ? std::numeric_limits<float>::infinity()
                              : std::numeric_limits<float>::quiet_NaN();
  } else if (exponent == 0) {
    magnitude = std::ldexp(static_cast<float>(fraction), -24);
  } else {
    magnitude = std::ldexp(static_cast<float>(fraction + 1024), exponent - 25);
  }
  return (half & 0x8000) != 0 ? -magnitude : magnitude;
}

inline float Widen(DType dtype, const std::byte* row, uint32_t index) {
  if (dtype == DType::kFp32) {
    float value = 0;
    std::memcpy(&value, row + size_t{index} * 4, sizeof(value));
    return value;
  }
  uint16_t half = 0;
  std::memcpy(&half, row + size_t{index} * 2, sizeof(half));
  return dtype == DType::kFp16 ? WidenFp16(half) : std::bit_cast<float>(uint32_t{half} << 16);
}

}  // namespace kvrelay::attention
