// Device memory that frees itself, for tests and benchmarks: a CUDA error ends the program.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdio>
#include <cstdlib>
#include <vector>

namespace kvrelay::attention::cuda {

// Ends the program: after a CUDA error nothing that follows means anything.
inline void Check(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  std::fprintf(stderr, "%s: %s\n", what, cudaGetErrorString(error));
  std::abort();
}
#define KVRELAY_CUDA(call) ::kvrelay::attention::cuda::Check(call, #call)

template <typename T>
class DeviceArray {
 public:
  explicit DeviceArray(size_t count) : count_(count) {
    KVRELAY_CUDA(cudaMalloc(reinterpret_cast<void**>(&data_), count_ * sizeof(T) + 16));
  }
  explicit DeviceArray(const std::vector<T>& host) : DeviceArray(host.size()) { Upload(host); }
  DeviceArray(const DeviceArray&) = delete;
  DeviceArray& operator=(const DeviceArray&) = delete;
  ~DeviceArray() { cudaFree(data_); }

  T* get() const { return data_; }
  size_t count() const { return count_; }
  void Upload(const std::vector<T>& host) {
    KVRELAY_CUDA(cudaMemcpy(data_, host.data(), host.size() * sizeof(T), cudaMemcpyHostToDevice));
  }
  std::vector<T> Download() const {
    std::vector<T> host(count_);
    KVRELAY_CUDA(cudaMemcpy(host.data(), data_, count_ * sizeof(T), cudaMemcpyDeviceToHost));
    return host;
  }
  // Every byte 0xff: NaN in all floating-point types.
  void Poison() { KVRELAY_CUDA(cudaMemset(data_, 0xff, count_ * sizeof(T))); }

 private:
  T* data_ = nullptr;
  size_t count_ = 0;
};

}  // namespace kvrelay::attention::cuda
