#include <cmath>
#include <limits>

#include "attention/attention.h"
#include "attention/value_row.h"
#include "attention/widen.h"

namespace kvrelay::attention {
namespace {

// One row of Q that sees the keys at positions [begin, end) and stands at the last of them.
struct NaiveRow {
  uint32_t begin = 0;
  uint32_t end = 0;
  uint32_t kv_head = 0;
  double scale = 1;
  double soft_cap = 0;
  double slope = 0;

  double Logit(double dot, uint32_t position) const {
    double logit = dot * scale;
    if (soft_cap != 0) logit = soft_cap * std::tanh(logit / soft_cap);
    const int64_t distance = int64_t{position} - (int64_t{end} - 1);
    return logit + slope * static_cast<double>(distance);
  }
};

// Weights in fp64 from the largest logit down.
double AttendRow(const KvView& kv, uint32_t layer, const Sequence& sequence, const NaiveRow& row,
                 const float* q, float* out) {
  const KvLayout& layout = kv.layout();
  const uint32_t dim = layout.head_dim;
  const auto block_of = [&](uint32_t position) {
    const uint32_t index = position / layout.block_size;
    return index < sequence.prefix.size() ? sequence.prefix[index]
                                          : sequence.blocks[index - sequence.prefix.size()];
  };
  std::vector<double> logits(row.end);
  double largest = -std::numeric_limits<double>::infinity();
  for (uint32_t position = row.begin; position < row.end; ++position) {
    const std::byte* k = kv.K(layer, block_of(position), row.kv_head, position % layout.block_size);
    double dot = 0;
    for (uint32_t d = 0; d < dim; ++d) dot += double{q[d]} * Widen(layout.dtype, k, d);
    logits[position] = row.Logit(dot * kv.KScale(layer, row.kv_head), position);
    largest = std::fmax(largest, logits[position]);
  }
  std::vector<double> sum(dim, 0.0);
  double total = 0;
  for (uint32_t position = row.begin; position < row.end; ++position) {
    const double weight = std::exp(logits[position] - largest);
    const std::byte* v =
        ValueRow(kv, layer, block_of(position), row.kv_head, position % layout.block_size);
    for (uint32_t d = 0; d < dim; ++d) sum[d] += weight * Widen(layout.dtype, v, d);
    total += weight;
  }
  const bool empty = row.begin == row.end;
  const double factor = kv.VScale(layer, row.kv_head) / total;
  for (uint32_t d = 0; d < dim; ++d) out[d] = empty ? 0.0F : static_cast<float>(sum[d] * factor);
  return empty ? largest : largest + std::log(total);
}

}  // namespace

void NaiveAttention(const KvView& kv, uint32_t layer, const Batch& batch, std::span<const float> q,
                    std::span<float> out, std::span<float> lse) {
  const uint32_t dim = kv.layout().head_dim;
  const uint32_t group = batch.query_heads / kv.layout().kv_heads;
  const AttentionKind& kind = batch.kind;
  for (const Sequence& sequence : batch.sequences) {
    for (uint32_t i = 0; i < sequence.rows; ++i) {
      NaiveRow row{.end = sequence.context - sequence.rows + i + 1,
                   .scale = batch.scale,
                   .soft_cap = kind.soft_cap};
      if (kind.window > 0 && row.end > kind.window) row.begin = row.end - kind.window;
      for (uint32_t head = 0; head < batch.query_heads; ++head) {
        const size_t index = size_t{sequence.first_row + i} * batch.query_heads + head;
        row.kv_head = head / group;
        row.slope = kind.alibi_slopes.empty() ? 0 : kind.alibi_slopes[head];
        lse[index] = static_cast<float>(
            AttendRow(kv, layer, sequence, row, q.data() + index * dim, out.data() + index * dim));
      }
    }
  }
}

}  // namespace kvrelay::attention
