#include <algorithm>
#include <memory>

#include "attention/attend_rows.h"
#include "attention/attention.h"
#include "attention/sequence_rows.h"
#include "base/parallel.h"

namespace kvrelay::attention {
namespace {

// One level's results, in the shape of the whole batch. Written are the rows of its groups.
struct LevelResult {
  std::unique_ptr<float[]> out;
  std::unique_ptr<float[]> lse;
};

std::vector<LevelResult> MakeLevels(const RelayMetadata& metadata, size_t out, size_t lse) {
  uint32_t count = 0;
  for (const RelayMetadata::Group& group : metadata.groups)
    count = std::max(count, group.level + 1);
  std::vector<LevelResult> levels(count);
  for (LevelResult& level : levels) {
    level.out = std::make_unique_for_overwrite<float[]>(out);
    level.lse = std::make_unique_for_overwrite<float[]>(lse);
  }
  return levels;
}

}  // namespace

void RelayAttention(const KvView& kv, uint32_t layer, const Batch& batch,
                    const RelayMetadata& metadata, std::span<const float> q, std::span<float> out,
                    std::span<float> lse) {
  const KvLayout& layout = kv.layout();
  const uint32_t group_size = batch.query_heads / layout.kv_heads;
  const uint32_t window = batch.kind.window;
  const std::vector<LevelResult> levels = MakeLevels(metadata, out.size(), lse.size());

  // Shared blocks first: their items are the long ones.
  std::vector<RowItem> items;
  for (const RelayMetadata::Group& group : metadata.groups) {
    const LevelResult& level = levels[group.level];
    const auto first = int64_t{group.first_block} * layout.block_size;
    const auto tokens = static_cast<uint32_t>(group.prefix.size() * layout.block_size);
    RowItem rows{{}, {group.prefix, {}, tokens}, level.out.get(), level.lse.get()};
    for (const uint32_t i : group.sequences) {
      rows.segments.push_back(Rows(batch.sequences[i], first));
    }
    AppendItems(rows, group_size, window, items);
  }
  std::vector<uint32_t> merged;
  for (uint32_t i = 0; i < metadata.shares.size(); ++i) {
    if (metadata.shares[i].levels == 0) continue;
    merged.push_back(i);
    AppendItems(
        KeysBehind(batch.sequences[i], metadata.shares[i].blocks, layout, out.data(), lse.data()),
        group_size, window, items);
  }
  for (const uint32_t i : metadata.paged) {
    AppendItems(KeysBehind(batch.sequences[i], 0, layout, out.data(), lse.data()), group_size,
                window, items);
  }
  AttendRows(kv, layer, batch, items, q.data());

  ParallelFor(merged.size(), 16, [&](size_t begin, size_t end) {
    for (size_t i = begin; i < end; ++i) {
      const Sequence& sequence = batch.sequences[merged[i]];
      const size_t first = size_t{sequence.first_row} * batch.query_heads;
      const size_t heads = size_t{sequence.rows} * batch.query_heads;
      for (uint32_t level = 0; level < metadata.shares[merged[i]].levels; ++level) {
        MergePartials(out.subspan(first * layout.head_dim, heads * layout.head_dim),
                      lse.subspan(first, heads),
                      {levels[level].out.get() + first * layout.head_dim, heads * layout.head_dim},
                      {levels[level].lse.get() + first, heads}, layout.head_dim);
      }
    }
  });
}

}  // namespace kvrelay::attention
