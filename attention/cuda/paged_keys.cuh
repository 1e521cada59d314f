// Tiles of keys on their way from a paged cache to shared memory.
#pragma once

#include "attention/cuda/paged_device.cuh"
#include "attention/cuda/ptx_async.h"

namespace kvrelay::attention::cuda {

// Rows of `kUnits` units of 16 bytes in shared memory, so that units at the same place of 8 rows
// lie in different banks.
template <uint32_t kUnits>
struct SharedRows {
  static constexpr bool kSwizzled = kUnits % 8 == 0;
  static constexpr uint32_t kStride = (kSwizzled ? kUnits : kUnits | 1) * 16;  // bytes

  __device__ static __forceinline__ uint32_t Place(uint32_t row, uint32_t unit) {
    return row * kStride + (kSwizzled ? unit ^ (row & 7) : unit) * 16;
  }
  // From the address of a row's unit 0, or 1 where `units` is even, to the one `units` ahead. The
  // first row begins at a multiple of 128.
  __device__ static __forceinline__ uint32_t Ahead(uint32_t address, uint32_t units) {
    return kSwizzled ? (address ^ units % 8 * 16) + units / 8 * 128 : address + units * 16;
  }
};

// Brings tiles of kKeys keys, each a row of kUnits units, into a ring of kStages stages: of K and V
// in turn, or, with kTensors 1, of K alone. All kWarps warps of the CTA call each member together;
// kNext is how many tiles they take at a time.
template <uint32_t kWarps, uint32_t kKeys, uint32_t kUnits, uint32_t kTensors, uint32_t kStages,
          uint32_t kNext>
class KeyTiles {
 public:
  using Rows = SharedRows<kUnits>;
  static constexpr uint32_t kTileBytes = kKeys * Rows::kStride;
  static_assert(kStages >= 2 * kNext && kStages % kNext == 0);

  // What the thread began to copy before belongs to the first tile's group.
  __device__ KeyTiles(const PagedArgs& args, const PagedWork& work, uint32_t ring)
      : args_(args), work_(work), ring_(ring), count_(PiecesOf(work.end - work.begin, kKeys)) {
    const LayerCache& cache = args.layer.cache;
    const auto k = reinterpret_cast<uint64_t>(cache.k);
    const auto v = reinterpret_cast<uint64_t>(cache.v);
    aligned_ = (k | v | cache.block_stride | cache.head_stride | cache.token_stride) % 16 == 0;
    Look();
    for (uint32_t i = 0; i < kStages - kNext; ++i) Issue();
  }

  __device__ __forceinline__ uint32_t count() const { return count_; }  // of each tensor

  // Returns where the next tile stands, once kNext of them are there and the CTA has met; those
  // that were taken before must have been read.
  __device__ __forceinline__ uint32_t Next() {
    ptx::WaitCopies<kStages - 2 * kNext>();
    __syncthreads();
    for (uint32_t i = 0; i < kNext; ++i) Issue();
    const uint32_t at = ring_ + taken_ * kTileBytes;
    taken_ = taken_ + kNext == kStages ? 0 : taken_ + kNext;
    return at;
  }

  // After the last tile. What came before the first is there, too, where there are no keys.
  __device__ __forceinline__ void Close() const { ptx::WaitCopies<0>(); }

 private:
  static constexpr uint32_t kWarpKeys = kKeys / kWarps;  // that a warp brings

  // Begins to bring the next tile; an empty group of copies after the last.
  __device__ __forceinline__ void Issue() {
    if (tile_ < count_) {
      const LayerCache& cache = args_.layer.cache;
      const void* tensor = tensor_ == 0 || cache.v == nullptr ? cache.k : cache.v;
      Copy(static_cast<const std::byte*>(tensor), ring_ + stage_ * kTileBytes);
      stage_ = stage_ + 1 == kStages ? 0 : stage_ + 1;
      tensor_ = tensor_ + 1 == kTensors ? 0 : tensor_ + 1;
      if (tensor_ == 0) {
        ++tile_;
        Look();
      }
    }
    ptx::CommitCopies();
  }

  // Where the next tile's keys lie: each lane finds one of the warp's. Beyond the end: the last
  // key, as what lies there may be no numbers.
  __device__ __forceinline__ void Look() {
    if (tile_ >= count_) return;
    const uint32_t key =
        work_.begin + tile_ * kKeys + threadIdx.x / 32 * kWarpKeys + threadIdx.x % kWarpKeys;
    offset_ = KeyOffset(args_, work_, min(key, work_.end - 1));
  }

  __device__ __forceinline__ void Copy(const std::byte* tensor, uint32_t to) const {
    constexpr uint32_t kCount = kWarpKeys * kUnits;
    const uint32_t first = threadIdx.x / 32 * kWarpKeys;
#pragma unroll
    for (uint32_t i = 0; i < PiecesOf(kCount, 32); ++i) {
      const uint32_t unit = i * 32 + threadIdx.x % 32;
      const uint32_t row = unit / kUnits;
      const uint32_t column = unit % kUnits;
      const uint64_t offset = __shfl_sync(~0U, offset_, row % kWarpKeys);
      if (kCount % 32 != 0 && unit >= kCount) continue;
      const uint32_t place = to + Rows::Place(first + row, column);
      const std::byte* from = tensor + offset + column * 16;
      if (aligned_) {
        ptx::CopyAsync16(place, from);
      } else {
        ptx::CopyAsync8(place, from);
        ptx::CopyAsync8(place + 8, from + 8);
      }
    }
  }

  const PagedArgs& args_;
  const PagedWork& work_;
  uint32_t ring_;
  uint32_t count_;
  uint32_t taken_ = 0;   // stage of the next tile to take
  uint32_t stage_ = 0;   // of the next tile to bring
  uint32_t tile_ = 0;    // which that is
  uint32_t tensor_ = 0;  // and of which tensor
  uint64_t offset_ = 0;
  bool aligned_;
};

}  // namespace kvrelay::attention::cuda
