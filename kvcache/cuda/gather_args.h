// What a launch of the gather kernel is given: the plan's shape by value, its tables by address.
#pragma once

#include <cstdint>

#include "kvcache/cuda/divisor.h"
#include "kvcache/layout.h"

namespace kvrelay::cuda {

inline constexpr uint32_t kGatherThreads = 1024;  // of a CTA
inline constexpr uint32_t kMaxLoads = 4;          // of a thread at a time
inline constexpr uint32_t kCastElements = 8;      // of a unit of a box that casts, or 1
inline constexpr uint32_t kMaxBoxes = 20;         // of a launch: arguments are up to 4 KiB

// Loads of a thread at a time from units of so many bytes: its registers hold 64 bytes of them.
constexpr uint32_t CastLoads(uint32_t src_unit) { return src_unit > 16 ? 2 : kMaxLoads; }

// Addresses or offsets on both sides.
struct alignas(16) GatherPair {
  uint64_t src;
  uint64_t dst;
};

// A box, flattened into units. Fewer than 2^31 of them; a larger box comes in parts.
struct GatherBox {
  uint32_t first_chunk = 0;  // chunks are numbered over the boxes of a launch
  uint32_t end_chunk = 0;
  uint32_t units = 0;
  uint32_t src_unit = 0;  // bytes
  uint32_t dst_unit = 0;  // the same, unless the box casts
  Divisor run_units;
  Divisor inner;
  Divisor outer;
  Divisor segments;
  uint32_t first_segment = 0;
  uint32_t first_place = 0;
  GatherPair inner_stride = {};
  GatherPair outer_stride = {};
  bool narrow_strides = false;  // all below 2^32
  // Of a box that casts.
  DType from = DType::kFp32;
  DType to = DType::kFp32;
  uint32_t first_factor = 0;
  uint32_t place_step = 0;
  uint32_t outer_step = 0;
  uint32_t inner_step = 0;
};

struct GatherArgs {
  const GatherPair* segments = nullptr;
  const GatherPair* places = nullptr;  // addresses
  const float* factors = nullptr;
  bool casts = false;        // all boxes, or none
  uint32_t ctas = 0;         //
  uint32_t chunk_units = 0;  // a chunk is what a CTA takes at a time: at most kMaxLoads a thread
  uint32_t boxes = 0;
  GatherBox box[kMaxBoxes];  // the one with the most units first
};
static_assert(sizeof(GatherArgs) <= 4096);

}  // namespace kvrelay::cuda
