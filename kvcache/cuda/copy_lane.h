// What one copy at a time needs of a device: a stream, room for a plan's tables, a word that says
// the end. Made once, used again.
#pragma once

#include <cuda_runtime_api.h>

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <span>

#include "base/clock.h"
#include "base/status.h"
#include "kvcache/cuda/gather_cuda.h"
#include "kvcache/cuda/long_runs.h"

namespace kvrelay::cuda {

// One thread at a time, with the device current; Ended also with another one.
class CopyLane {
 public:
  static Result<std::unique_ptr<CopyLane>> Create();
  CopyLane(const CopyLane&) = delete;
  CopyLane& operator=(const CopyLane&) = delete;
  ~CopyLane();

  // Nothing of it is under way. After a failure: Wait.
  Status Start(GatherCuda& gather);
  // The same by the copy engine.
  Status Start(std::span<const LongRun> runs);
  // A gather says its end itself, in a word that this reads. A word that does not come within a
  // millisecond is asked for at the device, once in each: that sees the device's errors.
  std::optional<Status> Ended();
  void Wait() const;

 private:
  CopyLane() = default;
  Status MakeRoom(size_t bytes);
  std::optional<Status> AskDevice();

  int device_ = 0;
  cudaStream_t stream_ = nullptr;
  void* tables_ = nullptr;  // of the device, for plans whose tables are large
  size_t table_bytes_ = 0;
  uint32_t* arrived_ = nullptr;            // of the device
  std::atomic<uint32_t>* word_ = nullptr;  // of the host, pinned
  uint32_t* word_at_ = nullptr;            // where the device sees it
  uint32_t value_ = 0;                     // of the word when the copy under way has ended
  TimePoint ask_at_;
};

}  // namespace kvrelay::cuda
