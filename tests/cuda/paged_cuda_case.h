// One step of many sequences on the device with random contents, and its oracle in fp64. Whatever
// no sequence wrote is NaN where the type has one: slots past a sequence's end, blocks of nobody,
// gaps between rows, outputs beforehand.
#pragma once

#include <cstdint>
#include <random>
#include <string>
#include <vector>

#include "attention/attention.h"
#include "attention/cuda/device_array.h"
#include "attention/cuda/paged_cuda.h"

namespace kvrelay::attention::cuda {

struct SequenceLengths {
  uint32_t rows = 1;
  uint32_t context = 0;  // the prefix's and the rows' tokens included
  uint32_t prefix = kNoPrefix;
};

enum class CaseScales : uint8_t { kNone, kTensor, kHead, kSequence };

struct PagedCudaShape {
  PagedShape kernels{.query_heads = 8, .kv_heads = 2};  // without limits and scale
  bool nhd = false;                                     // else HND
  bool interleaved = false;  // K and V of a token side by side in one tensor
  bool mla = false;          // no V
  uint32_t gap_bytes = 0;    // between rows
  float soft_cap = 0;
  bool alibi = false;
  CaseScales scales = CaseScales::kNone;
  float logits = 4.0F;             // about how large the largest are
  std::vector<uint32_t> prefixes;  // tokens of each
  std::vector<SequenceLengths> sequences;
  bool decode_rows() const;  // a row for each: first_rows is null
  std::string ToString() const;
};

struct PagedCudaOutput {
  std::vector<std::byte> out;
  std::vector<float> lse;
  bool operator==(const PagedCudaOutput& other) const;
};

// The step in host memory.
class PagedCudaContents {
 public:
  PagedCudaContents(const PagedCudaShape& shape, uint64_t seed);

  // The cache's values as fp32, as the sequence sees them; `memory` is what the view shows.
  KvView Widened(size_t sequence, std::vector<float>& memory) const;

  PagedCudaShape shape;
  std::vector<std::byte> k, v;  // v: empty without a tensor of its own
  LayerCache cache;             // its strides
  std::vector<std::vector<BlockId>> prefix_tables, tables;
  std::vector<std::byte> q;
  std::vector<float> k_scales, v_scales, slopes;

 private:
  uint64_t RowOffset(uint32_t block, uint32_t head, uint32_t token) const;
  void FillTokens(const std::vector<BlockId>& blocks, uint32_t tokens, std::mt19937_64& random);
  float Scale(const std::vector<float>& scales, size_t sequence, uint32_t head) const;
};

class PagedCudaCase {
 public:
  PagedCudaCase(const PagedCudaShape& shape, uint64_t seed);

  // New lengths for the same sequences (at most those of the shape, whose blocks and rows there
  // are): what a captured graph sees when a step follows another.
  void SetLengths(const std::vector<SequenceLengths>& sequences);

  void Launch(Stream stream);
  void Poison();
  PagedCudaOutput Read() const;
  PagedCudaOutput Run();
  // Fails the test with the first row and head that is not near the oracle.
  void ExpectRight(const PagedCudaOutput& got) const;

 private:
  const PagedCudaContents contents_;
  const PagedKernels kernels_;
  std::vector<SequenceLengths> now_;
  DeviceArray<std::byte> k_, v_, q_, out_;
  DeviceArray<float> lse_, k_scales_, v_scales_, slopes_;
  DeviceArray<uint32_t> contexts_, first_rows_, prefixes_, prefix_tokens_, blocks_, prefix_blocks_;
  DeviceArray<std::byte> workspace_;
  PagedLayer layer_;
  PagedBatch batch_;
};

}  // namespace kvrelay::attention::cuda
