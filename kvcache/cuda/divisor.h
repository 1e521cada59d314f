// Division by a number that the host knows, as the high half of a product.
#pragma once

#include <bit>
#include <cstdint>

namespace kvrelay::cuda {

// n / divisor for n < 2^31 is the high half of 2n * multiplier, shifted right by `shift`: with
// l = ceil(log2 divisor), multiplier = floor(2^(31 + l) / divisor) + 1 is too large by a factor
// below 1 + 2^-31, which n < 2^31 cannot make visible.
struct Divisor {
  uint32_t divisor = 1;
  uint32_t multiplier = 0x80000001;
  uint32_t shift = 0;

  Divisor() = default;
  // 1 <= divisor < 2^31
  explicit Divisor(uint32_t by)
      : divisor(by),
        multiplier(static_cast<uint32_t>((uint64_t{1} << (31 + std::bit_width(by - 1))) / by + 1)),
        shift(static_cast<uint32_t>(std::bit_width(by - 1))) {}
};

}  // namespace kvrelay::cuda
