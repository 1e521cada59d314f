#include <cmath>
#include <limits>

#include "attention/attention.h"
#include "attention/widen.h"

namespace kvrelay::attention {
namespace {

// One query row of one head: weights in fp64 from the largest logit down.
double AttendRow(const KvView& kv, uint32_t layer, const Sequence& sequence, uint32_t kv_head,
                 uint32_t keys, float scale, const float* q, float* out) {
  const KvLayout& layout = kv.layout();
  const uint32_t dim = layout.head_dim;
  const auto block_of = [&](uint32_t position) {
    const uint32_t index = position / layout.block_size;
    return index < sequence.prefix.size() ? sequence.prefix[index]
                                          : sequence.blocks[index - sequence.prefix.size()];
  };
  std::vector<double> logits(keys);
  double largest = -std::numeric_limits<double>::infinity();
  for (uint32_t position = 0; position < keys; ++position) {
    const std::byte* k = kv.K(layer, block_of(position), kv_head, position % layout.block_size);
    double dot = 0;
    for (uint32_t d = 0; d < dim; ++d) dot += double{q[d]} * Widen(layout.dtype, k, d);
    logits[position] = dot * scale;
    largest = std::fmax(largest, logits[position]);
  }
  std::vector<double> sum(dim, 0.0);
  double total = 0;
  for (uint32_t position = 0; position < keys; ++position) {
    const double weight = std::exp(logits[position] - largest);
    const std::byte* v = kv.V(layer, block_of(position), kv_head, position % layout.block_size);
    for (uint32_t d = 0; d < dim; ++d) sum[d] += weight * Widen(layout.dtype, v, d);
    total += weight;
  }
  for (uint32_t d = 0; d < dim; ++d) out[d] = keys == 0 ? 0.0F : static_cast<float>(sum[d] / total);
  return keys == 0 ? largest : largest + std::log(total);
}

}  // namespace

void NaiveAttention(const KvView& kv, uint32_t layer, const Batch& batch, std::span<const float> q,
                    std::span<float> out, std::span<float> lse) {
  const uint32_t dim = kv.layout().head_dim;
  const uint32_t group = batch.query_heads / kv.layout().kv_heads;
  for (const Sequence& sequence : batch.sequences) {
    for (uint32_t i = 0; i < sequence.rows; ++i) {
      const uint32_t keys = sequence.context - sequence.rows + i + 1;
      for (uint32_t head = 0; head < batch.query_heads; ++head) {
        const size_t index = size_t{sequence.first_row + i} * batch.query_heads + head;
        lse[index] =
            static_cast<float>(AttendRow(kv, layer, sequence, head / group, keys, batch.scale,
                                         q.data() + index * dim, out.data() + index * dim));
      }
    }
  }
}

}  // namespace kvrelay::attention
