// Online softmax of packed rows over some of their keys, as sums that can still be added up.
#pragma once

#include <cstddef>
#include <cstdint>

namespace kvrelay::attention {

// Per row: acc = sum exp(logit - m) * v (padded to padded_dim, the padding zero), l = sum exp(logit
// - m), m = largest logit. A row that saw no key: zeros and m = -inf. Lies in memory that it does
// not own (64-byte aligned).
struct SoftmaxState {
  uint32_t rows = 0;
  uint32_t padded_dim = 0;
  float* acc = nullptr;  // [rows][padded_dim]
  float* m = nullptr;    // [rows]
  float* l = nullptr;    // [rows]

  static size_t Floats(uint32_t rows, uint32_t padded_dim);
  static SoftmaxState In(float* memory, uint32_t rows, uint32_t padded_dim);

  void Clear() const;
  // Adds the state of keys that come later. Rounds, so the order matters: in order of position.
  void Add(const SoftmaxState& later) const;
  // The attention output of one row (head_dim floats), where a stored v means v * v_scale, and,
  // returned, its log-sum-exp. No key: zeros and -inf.
  float Finish(uint32_t row, uint32_t head_dim, float v_scale, float* out) const;
};

}  // namespace kvrelay::attention
