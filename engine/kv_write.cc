#include "engine/kv_write.h"

#include <cstring>

#include "kvcache/convert.h"

namespace kvrelay::engine {
namespace {

void StoreRow(DType dtype, const float* from, uint32_t count, float scale, std::byte* to) {
  const auto* const bytes = reinterpret_cast<const std::byte*>(from);
  if (dtype == DType::kFp32) {
    std::memcpy(to, bytes, count * sizeof(float));
    return;
  }
  ConvertRun(DType::kFp32, bytes, dtype, to, count, 1.0F / scale);
}

}  // namespace

void WriteKv(const KvView& kv, uint32_t layer, BlockId block, uint32_t token, const float* k,
             const float* v) {
  const KvLayout& layout = kv.layout();
  for (uint32_t head = 0; head < layout.kv_heads; ++head) {
    const size_t first = size_t{head} * layout.head_dim;
    StoreRow(layout.dtype, k + first, layout.head_dim, kv.KScale(layer, head),
             kv.K(layer, block, head, token));
    if (!layout.has_v()) continue;
    StoreRow(layout.dtype, v + first, layout.head_dim, kv.VScale(layer, head),
             kv.V(layer, block, head, token));
  }
}

}  // namespace kvrelay::engine
