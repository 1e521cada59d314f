#include "tests/kvcache/test_cache.h"

#include <algorithm>
#include <array>
#include <numeric>
#include <utility>

namespace kvrelay::testing_support {

std::byte TrueByte(uint32_t layer, bool v, uint32_t head, uint32_t token, uint64_t byte) {
  uint64_t x = byte;
  for (const uint64_t part : {uint64_t{layer}, uint64_t{v}, uint64_t{head}, uint64_t{token}}) {
    x = (x ^ (part + 1)) * 0x9e3779b97f4a7c15U;
    x ^= x >> 29;
  }
  return static_cast<std::byte>(x >> 24);
}

TestCache::TestCache(KvLayout layout, KvShard shard, std::byte fill)
    : layout_(std::move(layout)), shard_(shard) {
  for (const auto* tensors : {&layout_.k, &layout_.v}) {
    for (const TensorPlace& place : *tensors) {
      if (place.region >= regions_.size()) regions_.resize(place.region + 1);
      const uint64_t end = place.offset + (layout_.num_blocks - 1) * layout_.block_stride +
                           (layout_.kv_heads - 1) * layout_.head_stride +
                           (layout_.block_size - 1) * layout_.token_stride + layout_.row_bytes();
      auto& region = regions_[place.region];
      if (region.size() < end) region.resize(end, fill);
    }
  }
}

std::vector<uint64_t> TestCache::RegionBytes() const {
  std::vector<uint64_t> bytes;
  for (const auto& region : regions_) bytes.push_back(region.size());
  return bytes;
}

std::vector<std::byte*> TestCache::Bases() {
  std::vector<std::byte*> bases;
  for (auto& region : regions_) bases.push_back(region.data());
  return bases;
}

std::vector<const std::byte*> TestCache::ConstBases() const {
  std::vector<const std::byte*> bases;
  for (const auto& region : regions_) bases.push_back(region.data());
  return bases;
}

void TestCache::Write(TableView table, uint32_t layer_begin, uint32_t layer_end,
                      uint32_t head_begin, uint32_t head_end, TokenRange tokens) {
  for (uint32_t layer = layer_begin; layer < layer_end; ++layer) {
    for (const bool v : {false, true}) {
      if (v && !layout_.has_v()) continue;
      const TensorPlace& place = (v ? layout_.v : layout_.k)[layer - shard_.layer_begin];
      for (uint32_t head = head_begin; head < head_end; ++head) {
        for (uint32_t token = tokens.begin; token < tokens.end; ++token) {
          const uint32_t in_table = token - table.first_token;
          const uint64_t block = table.blocks[in_table / layout_.block_size];
          const uint64_t at = place.offset + block * layout_.block_stride +
                              (head - shard_.head_begin) * layout_.head_stride +
                              in_table % layout_.block_size * layout_.token_stride;
          for (uint64_t byte = 0; byte < layout_.row_bytes(); ++byte) {
            regions_[place.region][at + byte] = TrueByte(layer, v, head, token, byte);
          }
        }
      }
    }
  }
}

KvLayout RandomLayout(Random& random, const LayoutDims& dims, const KvShard& shard,
                      std::vector<uint64_t>& region_bytes) {
  KvLayout layout;
  layout.dtype = dims.dtype;
  layout.block_size = dims.block_size;
  layout.num_blocks = dims.num_blocks;
  layout.kv_heads = shard.head_count;
  layout.head_dim = dims.head_dim;
  const uint32_t tensors = dims.mla ? 1 : 2;

  enum Level { kToken, kHead, kBlock, kLayer, kTensor };
  std::array<Level, 5> order = {kToken, kHead, kBlock, kLayer, kTensor};
  std::shuffle(order.begin(), order.end(), random);
  const std::array<uint64_t, 5> counts = {dims.block_size, shard.head_count, dims.num_blocks,
                                          shard.layer_count, tensors};
  // 0: one region; 1: one for each layer; 2: one for each layer's K and V.
  const uint32_t split = Pick(random, 0, 2);
  std::array<uint64_t, 5> strides = {};
  uint64_t extent = layout.row_bytes();
  for (const Level level : order) {
    const bool own_region = (level == kLayer && split >= 1) || (level == kTensor && split == 2);
    if (own_region) continue;
    strides[level] = extent;
    if (Pick(random, 0, 3) == 0) strides[level] += Pick(random, 1, 9) * SizeOf(dims.dtype);
    extent = strides[level] * counts[level];
  }
  layout.token_stride = strides[kToken];
  layout.head_stride = strides[kHead];
  layout.block_stride = strides[kBlock];
  layout.format = dims.mla                                   ? KvFormat::kMla
                  : layout.head_stride < layout.token_stride ? KvFormat::kNhd
                                                             : KvFormat::kHnd;
  const uint64_t offset = Pick(random, 0, 3) * SizeOf(dims.dtype);
  for (uint32_t layer = 0; layer < shard.layer_count; ++layer) {
    for (uint32_t tensor = 0; tensor < tensors; ++tensor) {
      TensorPlace place;
      place.region = split == 0 ? 0 : split == 1 ? layer : layer * tensors + tensor;
      place.offset = offset + layer * strides[kLayer] + tensor * strides[kTensor];
      (tensor == 0 ? layout.k : layout.v).push_back(place);
      region_bytes.resize(std::max<size_t>(region_bytes.size(), place.region + 1), offset + extent);
    }
  }
  return layout;
}

std::vector<BlockId> RandomTable(Random& random, const KvLayout& layout, uint32_t first_token,
                                 uint32_t end) {
  const uint32_t needed = (end - first_token + layout.block_size - 1) / layout.block_size;
  std::vector<BlockId> blocks(layout.num_blocks);
  std::iota(blocks.begin(), blocks.end(), 0);
  std::shuffle(blocks.begin(), blocks.end(), random);
  blocks.resize(Pick(random, needed, std::min(needed + 1, layout.num_blocks)));
  return blocks;
}

}  // namespace kvrelay::testing_support
