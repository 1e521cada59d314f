// A kernel that occupies whole multiprocessors until it is told to end.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

namespace kvrelay::attention::cuda {

class HeldSms {
 public:
  // Returns once `count` multiprocessors are held. They let go by themselves after a few seconds.
  explicit HeldSms(uint32_t count);
  HeldSms(const HeldSms&) = delete;
  HeldSms& operator=(const HeldSms&) = delete;
  ~HeldSms();
  void Release() const;

 private:
  cudaStream_t stream_ = nullptr;
  // Host memory, which a device need not do atomics on: [0] not 0: let go; then each one's, not 0
  // when it holds.
  volatile uint32_t* words_ = nullptr;
};

}  // namespace kvrelay::attention::cuda
