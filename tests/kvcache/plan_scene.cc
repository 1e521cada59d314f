#include "tests/kvcache/plan_scene.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <initializer_list>
#include <numeric>
#include <utility>

#include "kvcache/convert.h"

namespace kvrelay::testing_support {
namespace {

uint64_t Hash(std::initializer_list<uint64_t> parts) {
  uint64_t x = 0;
  for (const uint64_t part : parts) {
    x = (x ^ (part + 1)) * 0x9e3779b97f4a7c15U;
    x ^= x >> 29;
  }
  return x;
}

// Element or byte i of a row, as the owner stores it; finite.
uint32_t StoredBits(const PlanCase& c, DType type, const Coordinates& at, uint32_t i) {
  const auto bits =
      static_cast<uint32_t>(Hash({c.content, at.layer, at.v, at.head, at.token, i}) >> 13);
  return WithNumber(type, [&](auto number) -> uint32_t {
    using Number = decltype(number);
    const auto own = static_cast<typename Number::Bits>(bits);
    return std::isfinite(Number::ToFloat(own)) ? own : own & 3U;
  });
}

}  // namespace

std::byte* Cache::At(const Coordinates& c) {
  const uint32_t local = c.layer - shard.layer_begin;
  const KvKind kind = layout.kind(layout.kind_of(local));
  const TableView& table = tables[layout.kind_of(local)];
  const TensorPlace& place = (c.v ? layout.v : layout.k)[local];
  const uint32_t head = c.head - shard.heads(kind.head_group).begin;
  const uint32_t slot =
      layout.opaque() ? c.token * kind.block_size - table.first_token : c.token - table.first_token;
  return regions[place.region].data() + place.offset +
         uint64_t{table.blocks[slot / kind.block_size]} * kind.block_stride +
         head * kind.head_stride + slot % kind.block_size * kind.token_stride;
}

float Cache::Scale(const Coordinates& c) const {
  const KvScales& scales = uses_request_scales ? request_scales : layout.scales;
  if (scales.empty()) return 1;
  const std::vector<float>& values = c.v ? scales.v : scales.k;
  const uint32_t local = c.layer - shard.layer_begin;
  if (!scales.per_head) return values[local];
  size_t at = 0;
  for (uint32_t i = 0; i < local; ++i) at += layout.kind(layout.kind_of(i)).kv_heads;
  return values[at + c.head - shard.heads(layout.kind(layout.kind_of(local)).head_group).begin];
}

PlanScene::PlanScene(PlanCase c) : c_(c) {
  const auto cut = [](uint32_t& value, uint32_t least, uint32_t most) {
    value = std::clamp(value, least, most);
  };
  c_.opaque = c_.opaque > 2 ? 0 : c_.opaque;
  c_.mla = c_.mla == 1 && c_.opaque == 0 ? 1 : 0;
  cut(c_.layers, 1, 4);
  cut(c_.reader_begin, 0, c_.layers - 1);
  cut(c_.reader_layers, 1, c_.layers - c_.reader_begin);
  two_kinds_ = c_.kinds < 16;
  cut(c_.heads, 1, 6);
  if (c_.mla == 1) c_.heads = 1;
  two_groups_ = two_kinds_ && c_.other_heads > 0 && c_.other_heads < 4 && c_.mla == 0;
  if (c_.window >= 20 || !two_kinds_) c_.window = 0;
  cut(c_.owner_tp, 1, 16);
  cut(c_.reader_tp, 1, 16);
  c_.reader_rank %= c_.reader_tp;
  c_.dim = c_.dim >= 24 ? 32 : std::max(1U, c_.dim);
  cut(c_.owner_block, 1, 9);
  c_.reader_block =
      c_.reader_block >= 10 || c_.opaque > 0 ? c_.owner_block : std::max(1U, c_.reader_block);
  c_.other_block =
      c_.other_block >= 10 || c_.opaque > 0 ? c_.owner_block : std::max(1U, c_.other_block);
  cut(c_.tokens, 1, 1000);
  if (c_.opaque > 0) c_.begin -= c_.begin % c_.owner_block;
  tokens_ = {c_.begin, c_.begin + c_.tokens};
  owner_type_ = static_cast<DType>(c_.owner_type >= 6 ? 2 : c_.owner_type);
  reader_type_ =
      c_.reader_type >= 6 || c_.opaque > 0 ? owner_type_ : static_cast<DType>(c_.reader_type);
  if (c_.opaque > 0) c_.owner_scales = c_.reader_scales = 7;

  owner_kinds_ = {{{0, 0, c_.owner_block}, {two_groups_ ? 1U : 0U, 0, c_.other_block}}};
  reader_kinds_ = {{{0, 0, c_.reader_block}, {two_groups_ ? 1U : 0U, c_.window, c_.reader_block}}};
  if (c_.window > 0) {
    const auto held = [&](uint32_t window) {
      return tokens_.end > window ? tokens_.end - window : 0;
    };
    reader_held_[1] = held(c_.window);
    if (c_.owner_window < 7) {
      owner_kinds_[1].window = c_.window + c_.owner_window;
      owner_held_[1] = held(owner_kinds_[1].window);
    }
  }
  uint32_t begin = 0;
  for (uint32_t layer = 0; layer < c_.layers; ++layer) {
    if (layer + 1 < c_.layers && (c_.owner_cuts >> layer & 1) == 0) continue;
    for (uint32_t rank = 0; rank < c_.owner_tp; ++rank) {
      owners_.push_back(Shard(c_.owner_tp, rank, begin, layer + 1));
    }
    begin = layer + 1;
  }
  reader_ =
      Shard(c_.reader_tp, c_.reader_rank, c_.reader_begin, c_.reader_begin + c_.reader_layers);
}

KvShard PlanScene::Shard(uint32_t tp, uint32_t rank, uint32_t layer_begin,
                         uint32_t layer_end) const {
  KvShard shard = KvShard::Make(c_.layers, c_.heads, tp, rank).value();
  shard.layer_begin = layer_begin;
  shard.layer_count = layer_end - layer_begin;
  if (two_groups_) shard.more_heads.push_back(KvHeads::Split(c_.other_heads, tp, rank));
  return shard;
}

// Blocks, heads, tokens, layers and K|V nested in any order, padding between them, one region for
// all, for each layer, or for each tensor.
void PlanScene::PlaceKind(Cache& cache, uint32_t kind_index, bool is_owner, Random& random,
                          uint64_t layout_seed) {
  KvLayout& layout = cache.layout;
  const KindDims& dims = (is_owner ? owner_kinds_ : reader_kinds_)[kind_index];
  const uint32_t held = (is_owner ? owner_held_ : reader_held_)[kind_index];
  KvKind kind;
  kind.head_group = dims.head_group;
  kind.window = dims.window;
  kind.block_size = dims.block;
  kind.kv_heads = cache.shard.heads(dims.head_group).count;
  kind.head_dim = c_.dim;
  const uint64_t element = SizeOf(layout.dtype);
  if (layout.opaque()) kind.page_bytes = element * c_.dim * dims.block * (c_.opaque == 2 ? 2 : 1);

  // The table, from some blocks before what is needed on, or from the first token held.
  const uint32_t before = (is_owner ? c_.owner_first : c_.reader_first) * dims.block;
  const uint32_t from = std::max(tokens_.begin, std::min(held, tokens_.end));
  uint32_t first = from - from % dims.block;
  first -= std::min(first, before) / dims.block * dims.block;
  const uint32_t needed = (tokens_.end - first + dims.block - 1) / dims.block;
  kind.num_blocks = needed + Pick(random, 0, 3);
  std::vector<BlockId>& blocks = cache.blocks[kind_index];
  blocks.resize(kind.num_blocks);
  std::iota(blocks.begin(), blocks.end(), 0);
  std::shuffle(blocks.begin(), blocks.end(), random);
  blocks.resize(Pick(random, needed, std::min(needed + 1, kind.num_blocks)));
  cache.tables[kind_index] = {blocks, first, held};

  enum Level { kToken, kHead, kBlock, kLayer, kTensor };
  std::vector<uint32_t> layers;
  for (uint32_t i = 0; i < layout.layers(); ++i) {
    if (KindOf(cache.shard.layer_begin + i) == kind_index) layers.push_back(i);
  }
  std::array<Level, 5> order = {kToken, kHead, kBlock, kLayer, kTensor};
  std::shuffle(order.begin(), order.end(), random);
  if (layout_seed == 0) order = {kHead, kToken, kBlock, kTensor, kLayer};
  if (layout_seed == 1) order = {kToken, kHead, kBlock, kTensor, kLayer};
  if (layout_seed == 2) order = {kTensor, kToken, kHead, kBlock, kLayer};
  const uint32_t tensors = layout.has_v() ? 2 : 1;
  const std::array<uint64_t, 5> counts = {layout.opaque() ? 1 : dims.block, kind.kv_heads,
                                          kind.num_blocks, std::max<uint64_t>(1, layers.size()),
                                          tensors};
  const uint32_t split = layout_seed <= 2 ? 0 : Pick(random, 0, 2);
  const bool pads = layout_seed > 2 && Pick(random, 0, 1) == 0;
  std::array<uint64_t, 5> strides = {};
  uint64_t extent = layout.opaque() ? kind.page_bytes : element * c_.dim;
  for (const Level level : order) {
    if ((level == kLayer && split >= 1) || (level == kTensor && split == 2)) continue;
    strides[level] = extent;
    if (pads && Pick(random, 0, 2) == 0) strides[level] += Pick(random, 1, 9) * element;
    extent = strides[level] * counts[level];
  }
  kind.token_stride = strides[kToken];
  kind.head_stride = strides[kHead];
  kind.block_stride = strides[kBlock];
  const uint64_t offset = (pads ? Pick(random, 0, 3) : 0) * element;
  const auto first_region = static_cast<RegionId>(cache.regions.size());
  for (uint32_t l = 0; l < layers.size(); ++l) {
    for (uint32_t t = 0; t < tensors; ++t) {
      const RegionId region = first_region + (split == 0 ? 0 : split == 1 ? l : l * tensors + t);
      cache.regions.resize(std::max<size_t>(cache.regions.size(), region + 1));
      cache.regions[region].resize(offset + extent, kUntouched);
      (t == 0 ? layout.k : layout.v)[layers[l]] = {
          region, offset + l * strides[kLayer] + t * strides[kTensor]};
    }
  }
  if (kind_index == 1) {
    layout.more_kinds.push_back(kind);
    return;
  }
  layout.block_size = kind.block_size;
  layout.num_blocks = kind.num_blocks;
  layout.kv_heads = kind.kv_heads;
  layout.head_dim = kind.head_dim;
  layout.block_stride = kind.block_stride;
  layout.head_stride = kind.head_stride;
  layout.token_stride = kind.token_stride;
  layout.page_bytes = kind.page_bytes;
}

void PlanScene::AddScales(Cache& cache, uint32_t way) const {
  if (way > 2) return;
  KvScales scales;
  scales.per_head = way >= 1;
  for (uint32_t i = 0; i < cache.layout.layers(); ++i) {
    const uint32_t layer = cache.shard.layer_begin + i;
    const KvHeads heads = cache.shard.heads(cache.layout.kind(KindOf(layer)).head_group);
    for (uint32_t head = heads.begin; head < (scales.per_head ? heads.end() : heads.begin + 1);
         ++head) {
      for (const bool v : {false, true}) {
        if (v && !cache.layout.has_v()) continue;
        const uint64_t x = Hash({c_.content, layer, v, scales.per_head ? head : 0, way});
        (v ? scales.v : scales.k)
            .push_back(x % 4 == 0 ? 1.0F : static_cast<float>(1 + x % 1000) / 300);
      }
    }
  }
  cache.uses_request_scales = way == 2;
  (way == 2 ? cache.request_scales : cache.layout.scales) = std::move(scales);
}

Cache PlanScene::MakeCache(const KvShard& shard, bool is_owner, uint64_t layout_seed) {
  Random random(Hash({layout_seed, c_.content, is_owner}));
  Cache cache;
  cache.shard = shard;
  KvLayout& layout = cache.layout;
  layout.dtype = is_owner ? owner_type_ : reader_type_;
  layout.format = c_.opaque > 0      ? KvFormat::kOpaque
                  : c_.mla == 1      ? KvFormat::kMla
                  : layout_seed == 0 ? KvFormat::kNhd
                                     : KvFormat::kHnd;
  if (c_.opaque > 0) layout.page_name = "tiled";
  layout.k.resize(shard.layer_count);
  if (c_.mla == 0 && c_.opaque != 2) layout.v.resize(shard.layer_count);
  if (two_kinds_) {
    for (uint32_t i = 0; i < shard.layer_count; ++i) {
      layout.layer_kinds.push_back(KindOf(shard.layer_begin + i));
    }
  }
  cache.blocks.resize(two_kinds_ ? 2 : 1);
  cache.tables.resize(cache.blocks.size());
  for (uint32_t kind = 0; kind < cache.blocks.size(); ++kind) {
    PlaceKind(cache, kind, is_owner, random, layout_seed);
  }
  AddScales(cache, is_owner ? c_.owner_scales : c_.reader_scales);
  return cache;
}

// In tokens, or in pages.
TokenRange PlanScene::Needed(uint32_t kind) const {
  TokenRange needed{std::max(tokens_.begin, std::min(reader_held_[kind], tokens_.end)),
                    tokens_.end};
  if (c_.opaque == 0) return needed;
  const uint32_t page = c_.owner_block;
  if (needed.size() == 0) return {0, 0};
  return {needed.begin / page, (needed.end + page - 1) / page};
}

// fn(coordinates) for every row (or page) that this rank holds and the reader needs.
template <typename Fn>
void PlanScene::ForEachRow(const Cache& cache, Fn&& fn) const {
  for (uint32_t layer = cache.shard.layer_begin; layer < cache.shard.layer_end(); ++layer) {
    const KvHeads heads = cache.shard.heads(cache.layout.kind(KindOf(layer)).head_group);
    const TokenRange needed = Needed(KindOf(layer));
    for (const bool v : {false, true}) {
      if (v && !cache.layout.has_v()) continue;
      for (uint32_t head = heads.begin; head < heads.end(); ++head) {
        for (uint32_t token = needed.begin; token < needed.end; ++token) {
          fn(Coordinates{layer, v, head, token});
        }
      }
    }
  }
}

void PlanScene::FillOwner(Cache& owner) const {
  const uint32_t size = SizeOf(owner_type_);
  ForEachRow(owner, [&](const Coordinates& at) {
    std::byte* const row = owner.At(at);
    if (c_.opaque > 0) {
      const uint64_t bytes = owner.layout.kind(KindOf(at.layer)).page_bytes;
      for (uint32_t i = 0; i < bytes; ++i) {
        row[i] = static_cast<std::byte>(StoredBits(c_, DType::kInt8, at, i));
      }
      return;
    }
    for (uint32_t i = 0; i < c_.dim; ++i) {
      const uint32_t bits = StoredBits(c_, owner_type_, at, i);
      std::memcpy(row + i * size, &bits, size);
    }
  });
}

void PlanScene::WriteExpected(Cache& expected) const {
  const uint32_t size = SizeOf(reader_type_);
  // Any owner has the same scales, if only of its own layers and heads.
  const uint32_t way = c_.owner_scales;
  ForEachRow(expected, [&](const Coordinates& at) {
    std::byte* const row = expected.At(at);
    if (c_.opaque > 0) {
      const uint64_t bytes = expected.layout.kind(KindOf(at.layer)).page_bytes;
      for (uint32_t i = 0; i < bytes; ++i) {
        row[i] = static_cast<std::byte>(StoredBits(c_, DType::kInt8, at, i));
      }
      return;
    }
    float theirs = 1;
    if (way <= 2) {
      // Per tensor, a rank's scale is the one of its own first head's name: head 0 for all.
      const uint64_t x = Hash({c_.content, at.layer, at.v, way >= 1 ? at.head : 0, way});
      theirs = x % 4 == 0 ? 1.0F : static_cast<float>(1 + x % 1000) / 300;
    }
    const float factor = theirs / expected.Scale(at);
    const bool copies = owner_type_ == reader_type_ && factor == 1;
    for (uint32_t i = 0; i < c_.dim; ++i) {
      const uint32_t bits = StoredBits(c_, owner_type_, at, i);
      std::byte from[4];
      std::memcpy(from, &bits, sizeof(from));
      if (copies) {
        std::memcpy(row + i * size, from, size);
      } else {
        ConvertRun(owner_type_, from, reader_type_, row + i * size, 1, factor);
      }
    }
  });
}

Cache& PlanScene::Owner(uint32_t index) {
  const auto it = owner_caches_.find(index);
  if (it != owner_caches_.end()) return it->second;
  const uint64_t seed = c_.owner_layout <= 2 ? c_.owner_layout : c_.owner_layout + 10000 * index;
  Cache& owner = owner_caches_.emplace(index, MakeCache(owners_[index], true, seed)).first->second;
  FillOwner(owner);
  return owner;
}

}  // namespace kvrelay::testing_support
