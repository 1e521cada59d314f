// Which keys a sequence's rows see: all, or those behind the blocks that it shares.
#pragma once

#include "attention/attend_rows.h"
#include "attention/attention.h"

namespace kvrelay::attention {

// Row i stands at position context - rows + i and sees itself and what is before it, of keys that
// begin at position `first`.
inline RowSegment Rows(const Sequence& sequence, int64_t first) {
  return {sequence.first_row, sequence.rows, int64_t{sequence.context} - sequence.rows + 1 - first};
}

// All its keys but those of the first `shared` blocks of its prefix.
inline RowItem KeysBehind(const Sequence& sequence, uint32_t shared, const KvLayout& layout,
                          float* out, float* lse) {
  const auto first = int64_t{shared} * layout.block_size;
  const auto keys = sequence.context > first ? static_cast<uint32_t>(sequence.context - first) : 0;
  return {
      {Rows(sequence, first)}, {sequence.prefix.subspan(shared), sequence.blocks, keys}, out, lse};
}

}  // namespace kvrelay::attention
