#include "attention/attend_rows.h"
#include "attention/attention.h"
#include "attention/sequence_rows.h"

namespace kvrelay::attention {

void PagedAttention(const KvView& kv, uint32_t layer, const Batch& batch, std::span<const float> q,
                    std::span<float> out, std::span<float> lse) {
  const uint32_t group = batch.query_heads / kv.layout().kv_heads;
  std::vector<RowItem> items;
  items.reserve(batch.sequences.size());
  for (const Sequence& sequence : batch.sequences) {
    AppendItems(KeysBehind(sequence, 0, kv.layout(), out.data(), lse.data()), group,
                batch.kind.window, items);
  }
  AttendRows(kv, layer, batch, items, q.data());
}

}  // namespace kvrelay::attention
