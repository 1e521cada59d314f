#include <cstring>

#include "attention/cuda/device_array.h"
#include "tests/cuda/hold_sms.h"

namespace kvrelay::attention::cuda {
namespace {

constexpr int kShared = 200 * 1024;  // no second CTA fits beside

__global__ void Hold(volatile uint32_t* words) {
  extern __shared__ uint8_t memory[];
  memory[0] = 0;
  if (threadIdx.x == 0) {
    words[1 + blockIdx.x] = 1;
    const uint64_t end = clock64() + (uint64_t{5} << 31);
    while (words[0] == 0 && clock64() < end) {
    }
  }
}

}  // namespace

HeldSms::HeldSms(uint32_t count) {
  void* memory = nullptr;
  KVRELAY_CUDA(cudaHostAlloc(&memory, (1 + count) * sizeof(uint32_t), cudaHostAllocMapped));
  std::memset(memory, 0, (1 + count) * sizeof(uint32_t));
  words_ = static_cast<volatile uint32_t*>(memory);
  KVRELAY_CUDA(cudaStreamCreateWithFlags(&stream_, cudaStreamNonBlocking));
  KVRELAY_CUDA(cudaFuncSetAttribute(Hold, cudaFuncAttributeMaxDynamicSharedMemorySize, kShared));
  Hold<<<count, 32, kShared, stream_>>>(words_);
  KVRELAY_CUDA(cudaGetLastError());
  for (uint32_t i = 1; i <= count; ++i) {
    while (words_[i] == 0) {
    }
  }
}

HeldSms::~HeldSms() {
  Release();
  KVRELAY_CUDA(cudaStreamSynchronize(stream_));
  KVRELAY_CUDA(cudaStreamDestroy(stream_));
  KVRELAY_CUDA(cudaFreeHost(const_cast<uint32_t*>(words_)));
}

void HeldSms::Release() const { words_[0] = 1; }

}  // namespace kvrelay::attention::cuda
