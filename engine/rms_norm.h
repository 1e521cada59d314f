// Root-mean-square normalisation.
#pragma once

#include <cmath>
#include <cstddef>
#include <vector>

namespace kvrelay::engine {

// out = weight * x / sqrt(mean of x^2 + eps), as many elements as `weight` has. `out` may be `x`.
inline void RmsNorm(const float* x, const std::vector<float>& weight, double eps, float* out) {
  double squares = 0;
  for (size_t i = 0; i < weight.size(); ++i) squares += double{x[i]} * x[i];
  const auto scale =
      static_cast<float>(1.0 / std::sqrt(squares / static_cast<double>(weight.size()) + eps));
  for (size_t i = 0; i < weight.size(); ++i) out[i] = weight[i] * (x[i] * scale);
}

}  // namespace kvrelay::engine
