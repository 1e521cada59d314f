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
// Order of a pull: Make, Upload once, Launch on the same stream (or behind it). Launch only
// launches kernels, one unless the plan has more than 20 boxes or both casts and copies; a graph
// may capture it. The caller picks the stream (its priority, its device) and learns of the
// end by an event.
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

  // Device memory that Upload fills and Launch reads.
  size_t table_bytes() const { return tables_.size(); }
  // `tables`: aligned to 16, the caller's; lives until the last launch is done. Returns when this
  // object may go, not when the bytes have arrived. Not while a graph is captured.
  Status Upload(void* tables, Stream stream);
  // Instead of Upload, for tables of a few KiB: writes them to host memory that the device reads at
  // `at`. Costs no call to the driver.
  void Write(void* tables, const void* at);
  // After Upload or Write.
  Status Launch(Stream stream) const;

 private:
  GatherCuda() = default;
  void PointTo(const void* tables);

  std::vector<GatherArgs> launches_;
  std::vector<std::byte> tables_;  // segments, places, factors
  size_t places_at_ = 0;
  size_t factors_at_ = 0;
};

}  // namespace kvrelay::cuda
