// One element of a cache row as the number that is stored, without its scale. The plain way;
// kernels widen whole vectors.
#pragma once

#include <cstddef>
#include <cstring>

#include "kvcache/convert.h"
#include "kvcache/layout.h"

namespace kvrelay::attention {

inline float Widen(DType dtype, const std::byte* row, uint32_t index) {
  return WithNumber(dtype, [&](auto number) {
    using Number = decltype(number);
    typename Number::Bits bits;
    std::memcpy(&bits, row + size_t{index} * sizeof(bits), sizeof(bits));
    return Number::ToFloat(bits);
  });
}

}  // namespace kvrelay::attention
