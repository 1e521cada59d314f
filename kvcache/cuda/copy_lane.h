// What one copy at a time needs of a device: a stream, an event, room for a plan's tables. Made
// once, used again.
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <memory>
#include <optional>

#include "base/status.h"
#include "kvcache/cuda/gather_cuda.h"

namespace kvrelay::cuda {

// One thread at a time, with the device current.
class CopyLane {
 public:
  static Result<std::unique_ptr<CopyLane>> Create();
  CopyLane(const CopyLane&) = delete;
  CopyLane& operator=(const CopyLane&) = delete;
  ~CopyLane();

  // Nothing of it is under way.
  Status Start(GatherCuda& gather);
  std::optional<Status> Ended() const;
  void Wait() const;

 private:
  CopyLane() = default;
  Status MakeRoom(size_t bytes);

  cudaStream_t stream_ = nullptr;
  cudaEvent_t ended_ = nullptr;
  void* tables_ = nullptr;  // of the device
  size_t table_bytes_ = 0;
  void* small_tables_ = nullptr;  // of the host, for plans whose tables are small
  void* small_at_ = nullptr;      // where the device sees them
};

}  // namespace kvrelay::cuda
