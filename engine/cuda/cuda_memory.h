// A GPU's memory, streams, events and graphs as owning handles. Each belongs to the device that was
// current when it was made, and is destroyed wherever its owner is.
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <memory>
#include <type_traits>
#include <utility>

#include "base/status.h"
#include "kvcache/cuda/cuda_status.h"

namespace kvrelay::engine::cuda {

using kvrelay::cuda::CudaStatus;

struct CudaFree {
  void operator()(void* p) const { cudaFree(p); }
};
struct CudaFreeHost {
  void operator()(void* p) const { cudaFreeHost(p); }
};

// `count` elements in device memory, not set. kResourceExhausted says what for.
template <typename T>
using DeviceBuffer = std::unique_ptr<T[], CudaFree>;
template <typename T>
Result<DeviceBuffer<T>> AllocateDevice(size_t count, const char* what) {
  void* data = nullptr;
  const size_t bytes = count * sizeof(T);
  if (cudaMalloc(&data, bytes > 0 ? bytes : 1) != cudaSuccess) {
    cudaGetLastError();  // or the next launch would report it
    size_t free = 0;
    size_t total = 0;
    cudaMemGetInfo(&free, &total);
    return Error(Code::kResourceExhausted, std::string(what) + " needs " + std::to_string(bytes) +
                                               " bytes on the GPU; " + std::to_string(free) +
                                               " are free");
  }
  return DeviceBuffer<T>(static_cast<T*>(data));
}

// The same in pinned host memory.
template <typename T>
using PinnedBuffer = std::unique_ptr<T[], CudaFreeHost>;
template <typename T>
Result<PinnedBuffer<T>> AllocatePinned(size_t count, const char* what) {
  void* data = nullptr;
  KVRELAY_RETURN_IF_ERROR(CudaStatus(cudaMallocHost(&data, count * sizeof(T)), what));
  return PinnedBuffer<T>(static_cast<T*>(data));
}

template <auto Destroy>
struct CudaDestroy {
  template <typename T>
  void operator()(T* p) const {
    Destroy(p);
  }
};
using Stream = std::unique_ptr<std::remove_pointer_t<cudaStream_t>, CudaDestroy<cudaStreamDestroy>>;
using Event = std::unique_ptr<std::remove_pointer_t<cudaEvent_t>, CudaDestroy<cudaEventDestroy>>;
using Graph =
    std::unique_ptr<std::remove_pointer_t<cudaGraphExec_t>, CudaDestroy<cudaGraphExecDestroy>>;

inline Result<Stream> MakeStream() {
  cudaStream_t stream = nullptr;
  KVRELAY_RETURN_IF_ERROR(
      CudaStatus(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking), "making a stream"));
  return Stream(stream);
}
inline Result<Event> MakeEvent() {
  cudaEvent_t event = nullptr;
  KVRELAY_RETURN_IF_ERROR(
      CudaStatus(cudaEventCreateWithFlags(&event, cudaEventDisableTiming), "making an event"));
  return Event(event);
}

}  // namespace kvrelay::engine::cuda
