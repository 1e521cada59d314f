// Device work around what a benchmark measures.
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>

namespace kvrelay::bench {

// Leaves the L2 cache cold and clean: writes 256 MiB, then reads another 256 MiB. A flush that only
// writes leaves dirty lines, whose write-back the measured kernel would pay.
class Flush {
 public:
  Flush();
  Flush(const Flush&) = delete;
  Flush& operator=(const Flush&) = delete;
  ~Flush();
  void Enqueue(cudaStream_t stream) const;

 private:
  uint8_t* memory_ = nullptr;
};

// Random 16-bit numbers about as a normal distribution's, of type bf16 or fp16.
void FillRandom(void* memory, size_t elements, bool bf16, uint32_t seed);

// Launches a kernel that does nothing.
void Nothing(cudaStream_t stream);

}  // namespace kvrelay::bench
