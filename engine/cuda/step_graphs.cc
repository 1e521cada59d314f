#include "engine/cuda/step_graphs.h"

#include <algorithm>
#include <bit>

namespace kvrelay::engine::cuda {
namespace {

Result<Graph> Capture(cudaStream_t stream, const std::function<Status()>& enqueue) {
  // Other ranks' threads go on allocating.
  KVRELAY_RETURN_IF_ERROR(CudaStatus(
      cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal), "capturing a step"));
  const Status enqueued = enqueue();
  cudaGraph_t graph = nullptr;
  const Status captured = CudaStatus(cudaStreamEndCapture(stream, &graph), "capturing a step");
  cudaGraphExec_t made = nullptr;
  Status status = enqueued.ok() ? captured : enqueued;
  if (status.ok()) {
    status = CudaStatus(cudaGraphInstantiate(&made, graph, 0), "making a step's graph");
  }
  if (graph != nullptr) cudaGraphDestroy(graph);
  if (!status.ok()) return Error(std::move(status));
  return Graph(made);
}

}  // namespace

uint32_t StepGraphs::Padded(uint32_t rows, uint32_t most) {
  constexpr uint32_t kFine = 8;
  constexpr uint32_t kCoarse = 32;
  constexpr uint32_t kCoarseFrom = 64;
  const auto up = [rows](uint32_t to) { return (rows + to - 1) / to * to; };
  if (rows <= kFine) return std::min(std::bit_ceil(rows), most);
  return std::min(up(rows <= kCoarseFrom ? kFine : kCoarse), most);
}

Status StepGraphs::Run(uint32_t rows, cudaStream_t stream, const std::function<Status()>& enqueue) {
  const auto [at, first] = graphs_.try_emplace(rows);
  if (first) return enqueue();
  if (!at->second) {
    KVRELAY_ASSIGN_OR_RETURN(at->second, Capture(stream, enqueue));
  }
  return CudaStatus(cudaGraphLaunch(at->second.get(), stream), "a step's graph");
}

}  // namespace kvrelay::engine::cuda
