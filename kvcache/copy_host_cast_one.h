// Conversion of a run one number after the other: what is left behind its last whole vector.
// Private to the host copy. Internal linkage: each instruction set compiles its own.
#pragma once

#include <cstddef>
#include <cstdint>

#include "kvcache/convert.h"

namespace kvrelay::internal {

template <typename Bits>
struct __attribute__((packed, may_alias)) UnalignedBits {
  Bits bits;
};

template <typename From, typename To>
KVRELAY_NUMBER void ConvertOneByOne(const std::byte* src, std::byte* dst, uint64_t elements,
                                    float factor) {
  const auto* from = reinterpret_cast<const UnalignedBits<typename From::Bits>*>(src);
  auto* to = reinterpret_cast<UnalignedBits<typename To::Bits>*>(dst);
  for (uint64_t i = 0; i < elements; ++i) {
    to[i].bits = To::FromFloat(From::ToFloat(from[i].bits) * factor);
  }
}

}  // namespace kvrelay::internal
