// Times what a stream does as replays of a CUDA graph, each after a flush that leaves L2 cold and
// clean.
#pragma once

#include <cuda_runtime_api.h>

#include <functional>
#include <utility>
#include <vector>

#include "attention/cuda/device_array.h"
#include "tools/bench/cuda/flush.h"
#include "tools/bench/spread.h"

namespace kvrelay::bench {

// Times one replay of what `enqueue` captures.
class GraphTimer {
 public:
  explicit GraphTimer(int iterations) : iterations_(iterations) {
    KVRELAY_CUDA(cudaStreamCreate(&stream_));
    KVRELAY_CUDA(cudaEventCreate(&begin_));
    KVRELAY_CUDA(cudaEventCreate(&end_));
  }
  Spread Measure(const std::function<void(cudaStream_t)>& enqueue) {
    cudaGraph_t graph = nullptr;
    cudaGraphExec_t replay = nullptr;
    KVRELAY_CUDA(cudaStreamBeginCapture(stream_, cudaStreamCaptureModeThreadLocal));
    enqueue(stream_);
    KVRELAY_CUDA(cudaStreamEndCapture(stream_, &graph));
    KVRELAY_CUDA(cudaGraphInstantiate(&replay, graph, 0));
    KVRELAY_CUDA(cudaGraphUpload(replay, stream_));
    std::vector<double> us;
    for (int i = -3; i < iterations_; ++i) {
      flush_.Enqueue(stream_);
      KVRELAY_CUDA(cudaEventRecord(begin_, stream_));
      KVRELAY_CUDA(cudaGraphLaunch(replay, stream_));
      KVRELAY_CUDA(cudaEventRecord(end_, stream_));
      KVRELAY_CUDA(cudaEventSynchronize(end_));
      float ms = 0;
      KVRELAY_CUDA(cudaEventElapsedTime(&ms, begin_, end_));
      if (i >= 0) us.push_back(ms * 1e3);
    }
    KVRELAY_CUDA(cudaGraphExecDestroy(replay));
    KVRELAY_CUDA(cudaGraphDestroy(graph));
    return Spread(std::move(us));
  }

 private:
  const int iterations_;
  Flush flush_;
  cudaStream_t stream_ = nullptr;
  cudaEvent_t begin_ = nullptr;
  cudaEvent_t end_ = nullptr;
};

}  // namespace kvrelay::bench
