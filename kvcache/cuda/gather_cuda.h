// The executor of a copy plan on an NVIDIA GPU: one kernel that reads all of a plan's source and
// writes all of its destination, from this device's memory, a peer's that is mapped here, or pinned
// host memory.
//
// Compiles without CUDA: streams and device memory are opaque pointers. Bytes and conversions are
// those of ExecuteCopy (of a NaN: to be a NaN).
//
// Threads own units of up to 16 bytes of the flattened request, neighbours in a run next to each
// other, so that short runs are copied as fast as long ones. A unit is the largest power of two
// that divides everything a box adds up to an address: layouts of odd sizes are copied right, but
// slowly.
//
// The source may be read through caches that do not see writes made while the kernel runs: the
// caller throws the result away when a lease ended meanwhile.
//
// Order of a pull: Make, Upload where there is something to upload, Launch on the same stream (or
// behind it). Launch only
// launches kernels, one unless the plan has more than 20 boxes or both casts and copies; a graph
// may capture it. The caller picks the stream (its priority, its device) and learns of the
// end by an event, or from the kernel itself (SayEnd).
//
// Threads: const members from any thread. Equal plans give equal bytes.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

#include "base/status.h"
#include "kvcache/copy_plan.h"

namespace kvrelay::cuda {

using Stream = void*;  // a cudaStream_t; null: the default stream

struct GatherArgs;
struct GatherEnd;

struct GatherOptions {
  uint32_t max_sms = 16;  // of the device, that a kernel may take: its CTAs, each of 1024 threads
};

class GatherCuda {
 public:
  // A validated plan between these regions (their device addresses, by RegionId). Pure: needs no
  // device. kTooLarge when one segment of a box has 2^31 units or more.
  static Result<GatherCuda> Make(const CopyPlan& plan,
                                 std::span<const std::byte* const> src_regions,
                                 std::span<std::byte* const> dst_regions,
                                 const GatherOptions& options = {});
  GatherCuda(GatherCuda&&) noexcept;
  GatherCuda& operator=(GatherCuda&&) noexcept;
  ~GatherCuda();

  // Device memory that Upload fills and Launch reads: 0 for plans of up to about a thousand blocks
  // and layers together, whose tables go with the launch.
  size_t table_bytes() const { return inlined_ ? 0 : tables_.size(); }
  // `tables`: aligned to 16, the caller's; lives until the last launch is done. Returns when this
  // object may go, not when the bytes have arrived. Not while a graph is captured.
  Status Upload(void* tables, Stream stream);
  // Before Launch: how it says its end, if it launches anything.
  void SayEnd(const GatherEnd& end);
  // After Upload, if there are table_bytes().
  Status Launch(Stream stream) const;
  bool empty() const { return launches_.empty(); }

 private:
  GatherCuda() = default;
  void PointTo(uintptr_t base);

  std::vector<GatherArgs> launches_;
  std::vector<std::byte> tables_;  // segments, places, factors; inlined: padded
  bool inlined_ = false;
  size_t places_at_ = 0;
  size_t factors_at_ = 0;
};

}  // namespace kvrelay::cuda
