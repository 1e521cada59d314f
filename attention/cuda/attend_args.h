// What a launch of the attention kernel is given.
#pragma once

#include <cuda.h>

#include "attention/cuda/plan.h"
#include "kvcache/layout.h"

namespace kvrelay::attention::cuda {

// Boxes of 16 tokens of one head: {64 columns, 8 tokens, column block, group of 8 tokens, place}.
// The u-th 16 tokens of block b's head h stand at place b * block_step + h * head_step + u *
// unit_step.
struct CacheMaps {
  CUtensorMap k;
  CUtensorMap v;
  uint32_t block_step;
  uint32_t head_step;
  uint32_t unit_step;
  uint32_t block_units;          // of 16 tokens
  uint32_t block_units_inverse;  // u / block_units = high half of u * inverse, for block_units > 1
};

struct AttendArgs {
  AttendShape shape;
  Plan plan;
  BlockTables tables;
  const void* q;  // [max_requests][heads][group][head_dim]
  void* out;
  float* lse;
};

}  // namespace kvrelay::attention::cuda
