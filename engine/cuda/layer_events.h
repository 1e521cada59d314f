// Says of a step that runs on a GPU which layers' K and V are in the cache.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>
#include <utility>
#include <vector>

#include "base/status.h"
#include "engine/cuda/cuda_memory.h"
#include "engine/model.h"

namespace kvrelay::engine::cuda {

// A layer is told of when the event behind its writes has come: then what peers read is there. One
// thread, with the device current.
class LayerEvents {
 public:
  static Result<LayerEvents> Create(uint32_t layers);

  void Begin(const ModelShard::LayersWritten& tell);
  // Behind the writes of the next layer. Tells of those that are done meanwhile.
  Status Record(cudaStream_t stream);
  // Waits for the recorded ones, and tells of each as it comes.
  Status Finish();

 private:
  LayerEvents() = default;
  Status TellDone();

  std::vector<Event> events_;
  ModelShard::LayersWritten tell_;
  uint32_t recorded_ = 0;
  uint32_t told_ = 0;
};

}  // namespace kvrelay::engine::cuda
