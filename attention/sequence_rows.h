// Which keys a sequence's rows see: all, its prefix's, or its own.
#pragma once

#include "attention/attend_rows.h"
#include "attention/attention.h"

namespace kvrelay::attention {

// Row i stands at position context - rows + i and sees itself and what is before it.
inline RowSegment Rows(const Sequence& sequence) {
  return {sequence.first_row, sequence.rows, int64_t{sequence.context} - sequence.rows + 1};
}

inline RowItem AllKeys(const Sequence& sequence, float* out, float* lse) {
  return {{Rows(sequence)}, {sequence.prefix, sequence.blocks, sequence.context}, out, lse};
}

inline RowItem OwnKeys(const Sequence& sequence, uint32_t prefix_tokens, float* out, float* lse) {
  RowSegment rows = Rows(sequence);
  rows.first_visible -= prefix_tokens;
  const uint32_t own = sequence.context > prefix_tokens ? sequence.context - prefix_tokens : 0;
  return {{rows}, {{}, sequence.blocks, own}, out, lse};
}

}  // namespace kvrelay::attention
