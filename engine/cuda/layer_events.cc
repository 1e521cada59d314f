#include "engine/cuda/layer_events.h"

namespace kvrelay::engine::cuda {

Result<LayerEvents> LayerEvents::Create(uint32_t layers) {
  LayerEvents events;
  for (uint32_t layer = 0; layer < layers; ++layer) {
    KVRELAY_ASSIGN_OR_RETURN(Event event, MakeEvent());
    events.events_.push_back(std::move(event));
  }
  return events;
}

void LayerEvents::Begin(const ModelShard::LayersWritten& tell) {
  tell_ = tell;
  recorded_ = 0;
  told_ = 0;
}

Status LayerEvents::Record(cudaStream_t stream) {
  KVRELAY_RETURN_IF_ERROR(
      CudaStatus(cudaEventRecord(events_[recorded_].get(), stream), "a layer's event"));
  ++recorded_;
  return TellDone();
}

Status LayerEvents::TellDone() {
  while (told_ < recorded_) {
    const cudaError_t error = cudaEventQuery(events_[told_].get());
    if (error == cudaErrorNotReady) break;
    KVRELAY_RETURN_IF_ERROR(CudaStatus(error, "a layer"));
    tell_(++told_);
  }
  return Status::Ok();
}

Status LayerEvents::Finish() {
  while (told_ < recorded_) {
    KVRELAY_RETURN_IF_ERROR(CudaStatus(cudaEventSynchronize(events_[told_].get()), "a layer"));
    tell_(++told_);
  }
  return Status::Ok();
}

}  // namespace kvrelay::engine::cuda
