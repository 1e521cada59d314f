#include <cmath>
#include <cstring>
#include <limits>

#include "attention/attention.h"

namespace kvrelay::attention {

void MergePartials(std::span<float> out, std::span<float> lse, std::span<const float> other_out,
                   std::span<const float> other_lse, uint32_t head_dim) {
  constexpr float kEmpty = -std::numeric_limits<float>::infinity();
  for (size_t row = 0; row < lse.size(); ++row) {
    float* ours = out.data() + row * head_dim;
    const float* theirs = other_out.data() + row * head_dim;
    // An empty side contributes nothing, not even by a weight of zero: its output may never have
    // been written.
    if (other_lse[row] == kEmpty) {
      if (lse[row] == kEmpty) std::memset(ours, 0, head_dim * sizeof(float));
      continue;
    }
    if (lse[row] == kEmpty) {
      std::memcpy(ours, theirs, head_dim * sizeof(float));
      lse[row] = other_lse[row];
      continue;
    }
    const float alpha = 1.0F / (1.0F + std::exp(lse[row] - other_lse[row]));
    const float beta = 1.0F - alpha;
    for (uint32_t d = 0; d < head_dim; ++d) ours[d] = alpha * theirs[d] + beta * ours[d];
    const float larger = std::fmax(lse[row], other_lse[row]);
    lse[row] = larger + std::log1p(std::exp(-std::fabs(lse[row] - other_lse[row])));
  }
}

}  // namespace kvrelay::attention
