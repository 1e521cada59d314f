// What a launch of the gather kernel is given: the plan's shape by value, its tables by address.
#pragma once

#include <vector_types.h>

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

// One behind the other.
struct GatherTables {
  const GatherPair* segments = nullptr;
  const GatherPair* places = nullptr;  // addresses
  const float* factors = nullptr;
};

// How a launch says that all it wrote is visible to everybody.
struct GatherEnd {
  uint32_t* arrived = nullptr;  // of the device, CTAs that are done: 0 before and after the launch
  uint32_t* word = nullptr;     // becomes `value`; as the device sees it. Null: it does not say
  uint32_t value = 0;
};

struct GatherArgs {
  GatherTables tables;  // in device memory; of tables that come as arguments: offsets
  GatherEnd end;
  uint32_t table_bytes = 0;  // in use, a multiple of 16
  bool casts = false;        // all boxes, or none
  uint32_t ctas = 0;         //
  uint32_t chunk_units = 0;  // a chunk is what a CTA takes at a time: at most kMaxLoads a thread
  uint32_t boxes = 0;
  GatherBox box[kMaxBoxes];  // the one with the most units first
};
static_assert(sizeof(GatherArgs) <= 4096);

// Small tables are an argument, too: a launch is all that it takes. (Read by each CTA out of the
// host's memory they cost 1.6 us a CTA: same addresses are read one after the other.) A kernel each
// for tables of up to so many bytes; 0: in device memory.
template <uint32_t kBytes>
struct InlineTables {
  uint4 words[kBytes / sizeof(uint4)];
};
template <>
struct InlineTables<0> {};
inline constexpr uint32_t kFewTables = 2 << 10;
inline constexpr uint32_t kManyTables = 24 << 10;  // arguments are up to 32,764 bytes from sm_70 on

}  // namespace kvrelay::cuda
