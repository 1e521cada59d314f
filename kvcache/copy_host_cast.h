// Conversions of runs as vector code. Private to the host copy and its tests.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>

#include "kvcache/layout.h"

namespace kvrelay::internal {

// to[i] = Round(float(from[i]) * factor) for i < elements, as kvcache/convert.h has it; any
// alignment. The source may change meanwhile.
using ConvertFn = void (*)(const std::byte* src, std::byte* dst, uint64_t elements, float factor);

struct ConvertIsa {
  const char* name;
  ConvertFn (*function)(DType from, DType to);  // both exist
};

// Those that this machine has, the best one first; at least one.
std::span<const ConvertIsa> ConvertIsas();

#if defined(__x86_64__)
ConvertFn ConvertAvx512(DType from, DType to);
ConvertFn ConvertAvx2(DType from, DType to);
#endif

}  // namespace kvrelay::internal
