#include "attention/softmax_state.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "attention/scratch.h"

namespace kvrelay::attention {
namespace {
constexpr float kNegInf = -std::numeric_limits<float>::infinity();
}  // namespace

size_t SoftmaxState::Floats(uint32_t rows, uint32_t padded_dim) {
  return size_t{rows} * padded_dim + 2 * Scratch::Padded(rows);
}

SoftmaxState SoftmaxState::In(float* memory, uint32_t rows, uint32_t padded_dim) {
  float* m = memory + size_t{rows} * padded_dim;
  return {rows, padded_dim, memory, m, m + Scratch::Padded(rows)};
}

void SoftmaxState::Clear() const {
  std::fill_n(acc, size_t{rows} * padded_dim, 0.0F);
  std::fill_n(m, rows, kNegInf);
  std::fill_n(l, rows, 0.0F);
}

void SoftmaxState::Add(const SoftmaxState& later) const {
  for (uint32_t r = 0; r < rows; ++r) {
    if (later.m[r] == kNegInf && later.l[r] == 0.0F) continue;  // it saw no key
    const float* from = later.acc + size_t{r} * padded_dim;
    float* into = acc + size_t{r} * padded_dim;
    if (m[r] == kNegInf && l[r] == 0.0F) {  // we did not: its bits, not their sum with zeros
      std::copy_n(from, padded_dim, into);
      m[r] = later.m[r];
      l[r] = later.l[r];
      continue;
    }
    const float largest = std::max(m[r], later.m[r]);
    const float ours = std::exp(m[r] - largest);
    const float theirs = std::exp(later.m[r] - largest);
    m[r] = largest;
    l[r] = l[r] * ours + later.l[r] * theirs;
    for (uint32_t d = 0; d < padded_dim; ++d) into[d] = into[d] * ours + from[d] * theirs;
  }
}

float SoftmaxState::Finish(uint32_t row, uint32_t head_dim, float v_scale, float* out) const {
  if (l[row] == 0.0F) {
    std::fill_n(out, head_dim, 0.0F);
    return kNegInf;
  }
  const float factor = v_scale / l[row];
  const float* from = acc + size_t{row} * padded_dim;
  for (uint32_t d = 0; d < head_dim; ++d) out[d] = from[d] * factor;
  return m[row] + std::log(l[row]);
}

}  // namespace kvrelay::attention
