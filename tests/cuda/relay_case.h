// One decode step on the device with random contents, and its oracle in fp64. Whatever no request
// wrote is NaN: slots past a request's end, blocks of nobody, outputs beforehand.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <random>
#include <string>
#include <vector>

#include "attention/cuda/device_array.h"
#include "attention/cuda/relay_cuda.h"

namespace kvrelay::attention::cuda {

// The seed of a randomised test: KVRELAY_SEED, or a fixed one.
inline uint64_t Seed() {
  const char* text = std::getenv("KVRELAY_SEED");
  return text != nullptr ? std::strtoull(text, nullptr, 10) : 20261121;
}

struct RequestLengths {
  uint32_t prefix = kNoPrefix;
  uint32_t own = 0;  // tokens
};

struct CaseShape {
  uint32_t query_heads = 8;
  uint32_t kv_heads = 2;
  uint32_t head_dim = 128;
  DType dtype = DType::kBf16;
  uint32_t block_size = 16;
  bool nhd = false;                // else HND
  bool interleaved = false;        // K and V of a token side by side in one tensor
  float logits = 4.0F;             // about how large the largest are
  std::vector<uint32_t> prefixes;  // tokens of each
  std::vector<RequestLengths> requests;
  std::string ToString() const;
};

struct CaseOutput {
  std::vector<uint16_t> out;  // as the cache's type
  std::vector<float> lse;
  bool operator==(const CaseOutput& other) const;
};

class RelayCase {
 public:
  RelayCase(const CaseShape& shape, uint64_t seed);

  // New lengths for the same requests and prefixes (at most those of the shape, which have the
  // blocks): what a captured graph sees when a step follows another.
  void SetLengths(const std::vector<RequestLengths>& requests,
                  const std::vector<uint32_t>& prefixes);

  const RelayKernels& kernels() const { return kernels_; }
  // Poisons the outputs and enqueues a step.
  void Enqueue(RelayMode mode, Stream stream);
  void Launch(RelayMode mode, Stream stream);  // without poisoning
  void Poison();
  CaseOutput Read() const;
  CaseOutput Run(RelayMode mode);
  // Fails the test with the first request and head that is not near the oracle.
  void ExpectRight(const CaseOutput& got) const;

 private:
  uint64_t RowOffset(uint32_t block, uint32_t head, uint32_t token) const;  // bytes
  double Element(const std::vector<uint16_t>& memory, uint64_t offset, uint32_t i) const;

  CaseShape shape_;
  RelayKernels kernels_;
  LayerCache cache_;
  std::vector<uint16_t> k_, v_, q_;
  uint32_t blocks_stride_ = 1;
  uint32_t prefix_blocks_stride_ = 1;
  std::vector<uint32_t> block_table_, prefix_table_;
  std::vector<RequestLengths> now_;
  std::vector<uint32_t> prefix_tokens_;
  DeviceArray<uint16_t> device_k_, device_v_, device_q_, device_out_;
  DeviceArray<float> device_lse_;
  DeviceArray<uint32_t> contexts_, prefixes_, blocks_, device_prefix_tokens_, prefix_blocks_;
  DeviceArray<uint8_t> workspace_;
  StepBatch batch_;
  LayerMaps maps_;
};

}  // namespace kvrelay::attention::cuda
