// Where V lies in caches with V and in those without.
#pragma once

#include "kvcache/kv_view.h"

namespace kvrelay::attention {

// A token's V row. Without V (MLA) that is its K row, whose first part is what V is made from.
inline const std::byte* ValueRow(const KvView& kv, uint32_t layer, BlockId block, uint32_t head,
                                 uint32_t token) {
  return kv.layout().has_v() ? kv.V(layer, block, head, token) : kv.K(layer, block, head, token);
}

}  // namespace kvrelay::attention
