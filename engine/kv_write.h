// Stores freshly computed K or V rows into a rank's cache.
#pragma once

#include <cstdint>

#include "kvcache/kv_view.h"

namespace kvrelay::engine {

// One token's `k` and `v`, each layout.kv_heads * layout.head_dim elements, head after head, to
// token `token` of `block`, in the cache's dtype and scales (rounded to nearest even, saturating:
// kvcache/convert.h). `v` is not read where the layout has none.
void WriteKv(const KvView& kv, uint32_t layer, BlockId block, uint32_t token, const float* k,
             const float* v);

}  // namespace kvrelay::engine
