#include "engine/kv_write.h"

#include <cstring>

#include "engine/half.h"

namespace kvrelay::engine {
namespace {

void StoreRow(DType dtype, const float* from, uint32_t count, std::byte* to) {
  if (dtype == DType::kFp32) {
    std::memcpy(to, from, count * sizeof(float));
    return;
  }
  for (uint32_t i = 0; i < count; ++i) {
    const uint16_t bits = dtype == DType::kFp16 ? HalfFromFloat(from[i]) : Bf16FromFloat(from[i]);
    std::memcpy(to + i * sizeof(bits), &bits, sizeof(bits));
  }
}

}  // namespace

void WriteKv(const KvView& kv, uint32_t layer, BlockId block, uint32_t token, const float* k,
             const float* v) {
  const KvLayout& layout = kv.layout();
  for (uint32_t head = 0; head < layout.kv_heads; ++head) {
    const size_t first = size_t{head} * layout.head_dim;
    StoreRow(layout.dtype, k + first, layout.head_dim, kv.K(layer, block, head, token));
    StoreRow(layout.dtype, v + first, layout.head_dim, kv.V(layer, block, head, token));
  }
}

}  // namespace kvrelay::engine
