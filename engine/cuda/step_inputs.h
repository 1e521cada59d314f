// A step's numbers on a GPU, at addresses that stay: graphs that were captured read the next step's
// there.
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>

#include "attention/cuda/paged_cuda.h"
#include "base/status.h"
#include "engine/cuda/cuda_memory.h"
#include "engine/model.h"

namespace kvrelay::engine::cuda {

// What a step may have at most.
struct StepLimits {
  uint32_t rows = 0;
  uint32_t sequences = 0;
  uint32_t blocks = 0;      // of a sequence
  uint32_t block_size = 0;  // tokens
};

// One thread at a time, with the device current.
class StepInputs {
 public:
  static Result<StepInputs> Create(const StepLimits& limits);

  const StepLimits& limits() const { return limits_; }
  // Copies begin on `stream`, of memory that stays as it is until the next call: by then they must
  // have ended. Rows from the step's up to `padded_rows` have no sequence and no block. Sequences
  // that the roots of step.relay name have these as their prefixes. kTooLarge names the limit.
  Status Upload(const StepRows& step, uint32_t padded_rows, cudaStream_t stream);

  const uint32_t* tokens() const { return At(kTokens); }
  const uint32_t* positions() const { return At(kPositions); }
  const BlockId* blocks() const { return At(kBlocks); }
  const uint32_t* logit_rows() const { return At(kLogitRows); }
  // Of a step whose sequences have one row each: `single_rows`.
  attention::cuda::PagedBatch batch(bool single_rows) const;

 private:
  enum Array : uint8_t {
    kTokens,
    kPositions,
    kBlocks,
    kLogitRows,
    kContexts,
    kPrefixes,
    kPrefixTokens,
    kFirstRows,
    kArrays
  };
  StepInputs() = default;
  const uint32_t* At(Array array) const { return device_.get() + offsets_[array]; }
  uint32_t* Host(Array array) { return host_.get() + offsets_[array]; }
  void FillRows(const StepRows& step, uint32_t padded_rows);
  uint32_t FillPrefixes(const StepRows& step);
  uint32_t FillTables(const StepRows& step);

  StepLimits limits_;
  size_t offsets_[kArrays + 1] = {};  // the last: their end
  // Arrays, then [sequences][blocks] of the tables, then as many of the prefixes.
  DeviceBuffer<uint32_t> device_;
  PinnedBuffer<uint32_t> host_;
};

}  // namespace kvrelay::engine::cuda
