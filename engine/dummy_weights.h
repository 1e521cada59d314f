// Numbers in place of a checkpoint's, for benchmarks of models that are not there.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <span>
#include <string>

namespace kvrelay::engine {

// Of one tensor: evenly spread around 0 with a standard deviation of 0.02, as models are made
// before training. The same wherever a rank's part begins.
class DummyWeights {
 public:
  explicit DummyWeights(const std::string& tensor) : seed_(std::hash<std::string>()(tensor)) {}

  // Elements [first, first + out.size()), row-major.
  void Fill(uint64_t first, std::span<float> out) const {
    constexpr float kHalfWidth = 0.0346F;  // 0.02 * sqrt(3)
    for (size_t i = 0; i < out.size(); ++i) {
      uint64_t z = seed_ ^ (first + i);
      z = (z ^ (z >> 32)) * 0x9e3779b97f4a7c15U;
      z = (z ^ (z >> 29)) * 0xbf58476d1ce4e5b9U;
      out[i] = static_cast<float>(static_cast<int32_t>(z >> 32)) * (kHalfWidth * 0x1p-31F);
    }
  }

 private:
  const uint64_t seed_;
};

}  // namespace kvrelay::engine
