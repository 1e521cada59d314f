#include "kvcache/request_scales.h"

#include <string>
#include <vector>

#include "kvcache/plan_box.h"

namespace kvrelay {
namespace {

// Where each layer's scales begin in KvScales, and behind the last one their number.
std::vector<size_t> FirstScales(const KvLayout& layout, bool per_head) {
  std::vector<size_t> first = {0};
  for (uint32_t layer = 0; layer < layout.layers(); ++layer) {
    first.push_back(first.back() +
                    (per_head ? layout.kind(layout.kind_of(layer)).kv_heads : size_t{1}));
  }
  return first;
}

}  // namespace

Status CheckRequestScales(const KvLayout& layout, const KvScales& scales) {
  if (!layout.scales.with_request) {
    if (scales.empty()) return Status::Ok();
    return {Code::kInvalidArgument, "scales came with a request for a cache of " +
                                        layout.ToString() + ", whose own hold for all"};
  }
  if (scales.per_head != layout.scales.per_head || scales.with_request) {
    return {Code::kInvalidArgument, std::string("a request's scales are not ") +
                                        (layout.scales.per_head ? "per head" : "per tensor") +
                                        " as its cache's"};
  }
  return CheckScales(layout, scales);
}

TakenScales::TakenScales(const KvLayout& layout, const KvShard& shard)
    : layout_(layout), shard_(shard) {
  if (!layout.scales.with_request) return;
  scales_.per_head = layout.scales.per_head;
  const size_t count = FirstScales(layout, scales_.per_head).back();
  scales_.k.resize(count);
  scales_.v.resize(layout.has_v() ? count : 0);
}

Status TakenScales::Take(const PullSide& owner, const PullSource& source) {
  if (!layout_.scales.with_request) return Status::Ok();
  const internal::ScaleOf scale(owner);
  const std::vector<size_t> first = FirstScales(layout_, scales_.per_head);
  const PullSide reader{layout_, shard_, {}};
  for (const internal::CommonLayers& common : internal::CommonLayersOf(owner, reader)) {
    if (layout_.kind(common.reader_kind).head_group != source.head_group) continue;
    for (const uint32_t layer : common.layers) {
      for (uint32_t head = source.head_begin; head < source.head_end; ++head) {
        const uint32_t own_head = head - shard_.heads(source.head_group).begin;
        const size_t at = first[layer - shard_.layer_begin] + (scales_.per_head ? own_head : 0);
        for (const bool is_v : {false, true}) {
          if (is_v && !layout_.has_v()) continue;
          float& taken = (is_v ? scales_.v : scales_.k)[at];
          const float given = scale(is_v, layer - owner.shard.layer_begin,
                                    head - owner.shard.heads(source.head_group).begin);
          if (taken != 0 && taken != given) {
            return internal::Differ("scales of layer " + std::to_string(layer) +
                                        ", and the reader keeps one for all heads",
                                    std::to_string(given), std::to_string(taken));
          }
          taken = given;
        }
      }
    }
  }
  return Status::Ok();
}

}  // namespace kvrelay
