#include "engine/self_attention.h"

namespace kvrelay::engine {

void RunAttention(const StepRows& step, const KvView& kv, uint32_t layer,
                  const attention::Batch& batch, const std::vector<float>& q,
                  std::vector<float>& out, std::vector<float>& lse) {
  lse.resize(step.token_ids.size() * batch.query_heads);
  if (step.naive) {
    attention::NaiveAttention(kv, layer, batch, q, out, lse);
  } else if (step.relay != nullptr) {
    attention::RelayAttention(kv, layer, batch, *step.relay, q, out, lse);
  } else {
    attention::PagedAttention(kv, layer, batch, q, out, lse);
  }
}

}  // namespace kvrelay::engine
