// Decoding steps as CUDA graphs, one for each padded number of rows.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>
#include <functional>
#include <map>

#include "base/status.h"
#include "engine/cuda/cuda_memory.h"

namespace kvrelay::engine::cuda {

// One thread, with the device current.
class StepGraphs {
 public:
  // Of what graphs there are, the fewest rows that hold `rows`, at most `most`.
  static uint32_t Padded(uint32_t rows, uint32_t most);

  // Runs what `enqueue` puts on the stream, which has to be the same for equal `rows`. The first
  // time as it is, for whatever is loaded or tuned on first use, then captured, then replayed.
  Status Run(uint32_t rows, cudaStream_t stream, const std::function<Status()>& enqueue);

 private:
  std::map<uint32_t, Graph> graphs_;  // null: enqueued once
};

}  // namespace kvrelay::engine::cuda
