// Rotary positions as Hugging Face computes them: element i of a head's first half turns with
// element i of its second half.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "engine/model_config.h"

namespace kvrelay::engine {

// Angle per position of each pair, head_dim / 2 values in fp32; "llama3" stretches the slow ones.
std::vector<float> InverseFrequencies(const RopeConfig& rope, uint32_t head_dim);

// cos and sin of a step's rows.
class RopeTable {
 public:
  RopeTable(std::span<const float> inverse_frequencies, std::span<const uint32_t> positions);

  // Turns `heads` consecutive heads of head_dim elements in place, by the position of `row`.
  void Rotate(size_t row, float* data, uint32_t heads) const;

 private:
  size_t half_;
  std::vector<float> cos_;  // [rows][half]
  std::vector<float> sin_;
};

}  // namespace kvrelay::engine
