#include <memory>

#include "attention/attend_rows.h"
#include "attention/attention.h"
#include "attention/sequence_rows.h"
#include "base/parallel.h"

namespace kvrelay::attention {

void RelayAttention(const KvView& kv, uint32_t layer, const Batch& batch,
                    const RelayMetadata& metadata, std::span<const float> q, std::span<float> out,
                    std::span<float> lse) {
  const KvLayout& layout = kv.layout();
  const uint32_t group = batch.query_heads / layout.kv_heads;
  const uint32_t window = batch.kind.window;
  // The prefix passes' results, in the shape of the whole batch.
  const bool relay = !metadata.groups.empty();
  const auto prefix_out = std::make_unique_for_overwrite<float[]>(relay ? out.size() : 0);
  const auto prefix_lse = std::make_unique_for_overwrite<float[]>(relay ? lse.size() : 0);

  // Prefixes first: their items are the long ones.
  std::vector<RowItem> items;
  std::vector<uint32_t> merged;
  for (const RelayMetadata::Group& shared : metadata.groups) {
    const auto tokens = static_cast<uint32_t>(shared.prefix.size() * layout.block_size);
    RowItem rows{{}, {shared.prefix, {}, tokens}, prefix_out.get(), prefix_lse.get()};
    for (const uint32_t i : shared.sequences) {
      rows.segments.push_back(Rows(batch.sequences[i]));
      merged.push_back(i);
    }
    AppendItems(rows, group, window, items);
  }
  for (const RelayMetadata::Group& shared : metadata.groups) {
    const auto tokens = static_cast<uint32_t>(shared.prefix.size() * layout.block_size);
    for (const uint32_t i : shared.sequences) {
      AppendItems(OwnKeys(batch.sequences[i], tokens, out.data(), lse.data()), group, window,
                  items);
    }
  }
  for (const uint32_t i : metadata.paged) {
    AppendItems(AllKeys(batch.sequences[i], out.data(), lse.data()), group, window, items);
  }
  AttendRows(kv, layer, batch, items, q.data());

  ParallelFor(merged.size(), 16, [&](size_t begin, size_t end) {
    for (size_t i = begin; i < end; ++i) {
      const Sequence& sequence = batch.sequences[merged[i]];
      const size_t first = size_t{sequence.first_row} * batch.query_heads;
      const size_t heads = size_t{sequence.rows} * batch.query_heads;
      MergePartials(out.subspan(first * layout.head_dim, heads * layout.head_dim),
                    lse.subspan(first, heads),
                    {prefix_out.get() + first * layout.head_dim, heads * layout.head_dim},
                    {prefix_lse.get() + first, heads}, layout.head_dim);
    }
  });
}

}  // namespace kvrelay::attention
