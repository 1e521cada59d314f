// What an attention CTA keeps in shared memory, and the ring that K and V stream through.
//
// A tile of K or V (128 tokens) or of Q (128 rows) is stored as [row / 8][64 columns][row % 8]:
// blocks of 8 rows x 128 bytes, in which the 16-byte unit u of row r stands at u ^ r (the copy
// engine's 128-byte swizzle). Groups of 8 rows are thus equally far apart whatever the page size,
// as the tensor cores' descriptors need.
#pragma once

#include <cstdint>

#include "attention/cuda/plan.h"
#include "attention/cuda/ptx.h"

namespace kvrelay::attention::cuda {

inline constexpr uint32_t kConsumerWarps = 8;
inline constexpr uint32_t kConsumerThreads = 32 * kConsumerWarps;
inline constexpr uint32_t kCtaThreads =
    128 + kConsumerThreads;                                   // the first 128: three producer warps
inline constexpr uint32_t kWorkReaders = kConsumerWarps + 2;  // of an item: K's and V's producers
inline constexpr uint32_t kUnitsPerTile = kTileTokens / kUnitTokens;

// What the consumers need to know of an item.
struct alignas(16) Work {
  union {
    SuffixItem suffix;
    PrefixItem prefix;
  };
  WorkKind kind;
  uint32_t q_slot;     // of a suffix item
  int32_t places[32];  // of the first units, see CacheMaps
};

template <uint32_t kHeadDim>
struct Shared {
  static constexpr uint32_t kColumnBlocks = kHeadDim / 64;
  static constexpr uint32_t kGroupBytes = kColumnBlocks * 1024;  // 8 rows
  static constexpr uint32_t kUnitBytes = 2 * kGroupBytes;
  static constexpr uint32_t kTileBytes = kTileTokens * kHeadDim * 2;
  static constexpr uint32_t kStages = 5 * 32768 / kTileBytes;
  // A slot of suffix queries is written again at the earliest when the ring has gone round.
  static constexpr uint32_t kQuerySlots = (kStages + 1) / 2;
  static constexpr uint32_t kQueryRowBytes = kHeadDim * 2 + 16;  // no bank conflicts
  static constexpr uint32_t kWorkSlots = 8;

  alignas(1024) uint8_t ring[kStages][kTileBytes];
  alignas(1024) uint8_t q[kTileBytes];  // of a prefix item
  alignas(16) uint8_t suffix_q[kQuerySlots][kMaxGroup][kQueryRowBytes];
  Work work[kWorkSlots];
  alignas(8) uint64_t full[kStages];
  uint64_t empty[kStages];
  uint64_t work_full[kWorkSlots];
  uint64_t work_empty[kWorkSlots];
  uint64_t turns[kConsumerWarps];     // to begin with a suffix item
  uint64_t releases[kConsumerWarps];  // to release its stages

  static_assert(kTileRows * kHeadDim * 2 == kTileBytes);
};

// A position in a ring of barriers; every pass flips the parity to wait for.
template <uint32_t kSlots>
struct RingPosition {
  uint32_t slot = 0;
  uint32_t parity = 0;

  __device__ __forceinline__ void Next() {
    if (++slot == kSlots) {
      slot = 0;
      parity ^= 1;
    }
  }
  __device__ __forceinline__ void Skip(uint32_t count) {
    slot += count;
    parity ^= slot / kSlots % 2;
    slot %= kSlots;
  }
};

// Named barriers; 0 is __syncthreads.
inline constexpr uint32_t kConsumersBarrier = 1;
inline constexpr uint32_t kWarpgroupBarrier = 2;  // and 3
inline constexpr uint32_t kProductsBarrier = 4;   // and 5

}  // namespace kvrelay::attention::cuda
