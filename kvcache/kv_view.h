// A rank's own cache as attention sees it: a layout and where its regions are mapped here.
#pragma once

#include <cstddef>
#include <vector>

#include "kvcache/layout.h"

namespace kvrelay {

// Does not own the memory. Indices are not checked.
class KvView {
 public:
  KvView(KvLayout layout, std::vector<std::byte*> region_bases)
      : layout_(std::move(layout)), bases_(std::move(region_bases)) {}

  const KvLayout& layout() const { return layout_; }
  std::byte* K(uint32_t layer, BlockId block, uint32_t head, uint32_t token) const {
    return Row(layout_.k[layer], block, head, token);
  }
  std::byte* V(uint32_t layer, BlockId block, uint32_t head, uint32_t token) const {
    return Row(layout_.v[layer], block, head, token);
  }
  // A stored number q means q * scale.
  float KScale(uint32_t layer, uint32_t head) const {
    return ScaleOf(layout_.scales.k, layer, head);
  }
  // Without V (MLA) what is read as V are K's numbers.
  float VScale(uint32_t layer, uint32_t head) const {
    return layout_.has_v() ? ScaleOf(layout_.scales.v, layer, head) : KScale(layer, head);
  }

 private:
  std::byte* Row(const TensorPlace& place, BlockId block, uint32_t head, uint32_t token) const {
    return bases_[place.region] + place.offset + block * layout_.block_stride +
           head * layout_.head_stride + token * layout_.token_stride;
  }
  float ScaleOf(const std::vector<float>& scales, uint32_t layer, uint32_t head) const {
    if (scales.empty()) return 1.0F;
    return layout_.scales.per_head ? scales[size_t{layer} * layout_.kv_heads + head]
                                   : scales[layer];
  }

  KvLayout layout_;
  std::vector<std::byte*> bases_;
};

}  // namespace kvrelay
