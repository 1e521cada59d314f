#include "kvcache/stream_chunks.h"

#include <algorithm>
#include <limits>
#include <string>

#include "kvcache/plan_box.h"

namespace kvrelay {
namespace {

// Shapes come from peers. With these bounds nothing below overflows 64 bits.
constexpr uint32_t kMaxStreamLayers = 1U << 12;
constexpr uint32_t kMaxStreamHeads = 1U << 12;
constexpr uint32_t kMaxStreamHeadDim = 1U << 16;
constexpr uint32_t kMaxTokens = 1U << 20;
constexpr uint32_t kMaxPageTokens = 1U << 16;
constexpr uint64_t kMaxPageBytes = 1U << 30;

bool IsRange(uint32_t begin, uint32_t end, uint32_t max) {
  return begin < end && end - begin <= max;
}

bool IsSane(const StreamShape& shape) {
  const bool ascending = std::adjacent_find(shape.layers.begin(), shape.layers.end(),
                                            std::greater_equal<>()) == shape.layers.end();
  const bool pages = shape.page_tokens > 0 ? shape.page_tokens <= kMaxPageTokens &&
                                                 shape.page_bytes <= kMaxPageBytes &&
                                                 shape.tokens.begin % shape.page_tokens == 0 &&
                                                 shape.segment_tokens % shape.page_tokens == 0
                                           : shape.page_bytes == 0;
  return !shape.layers.empty() && shape.layers.size() <= kMaxStreamLayers && ascending && pages &&
         IsRange(shape.head_begin, shape.head_end, kMaxStreamHeads) &&
         IsRange(shape.tokens.begin, shape.tokens.end, kMaxTokens) &&
         shape.tokens.end <= UINT32_MAX - kMaxPageTokens && shape.head_dim <= kMaxStreamHeadDim &&
         SizeOf(shape.dtype) > 0 && shape.row_bytes() > 0;
}

std::string Describe(const StreamShape& shape) {
  const auto range = [](uint32_t begin, uint32_t end) {
    return std::to_string(begin) + " to " + std::to_string(end);
  };
  std::string text = "stream of " + std::to_string(shape.layers.size()) + " layers";
  if (!shape.layers.empty()) text += " from " + std::to_string(shape.layers.front());
  text += ", heads " + range(shape.head_begin, shape.head_end) + ", tokens " +
          range(shape.tokens.begin, shape.tokens.end) + ", head dim " +
          std::to_string(shape.head_dim) + ", " + std::string(DTypeName(shape.dtype));
  if (shape.page_tokens > 0) text += ", opaque pages of " + std::to_string(shape.page_bytes);
  return text + (shape.has_v ? "" : ", no V");
}

// Tensors of the stream: K and V of each layer count apart.
uint64_t TensorsPerLayer(const StreamShape& shape) { return shape.has_v ? 2 : 1; }
uint64_t Heads(const StreamShape& shape) { return shape.head_end - shape.head_begin; }
uint64_t Rows(const StreamShape& shape) {
  return shape.layers.size() * TensorsPerLayer(shape) * Heads(shape);
}

// The kind that the stream's layers are of in this cache.
Result<uint32_t> CheckHolds(std::string_view name, const PullSide& cache,
                            const StreamShape& shape) {
  const KvLayout& layout = cache.layout;
  const KvShard& shard = cache.shard;
  KVRELAY_RETURN_IF_ERROR(internal::CheckSide(name, layout, shard));
  if (shape.layers.front() < shard.layer_begin || shape.layers.back() >= shard.layer_end()) {
    return Error(Code::kInvalidArgument, "layers " + std::to_string(shape.layers.front()) + " to " +
                                             std::to_string(shape.layers.back() + 1) +
                                             " are not held by " + std::string(name) + " " +
                                             shard.ToString());
  }
  const uint32_t index = layout.kind_of(shape.layers.front() - shard.layer_begin);
  const KvKind kind = layout.kind(index);
  const bool alike = std::all_of(shape.layers.begin(), shape.layers.end(), [&](uint32_t layer) {
    return layout.kind_of(layer - shard.layer_begin) == index;
  });
  const bool pages_fit = layout.opaque() ? shape.page_tokens == kind.block_size &&
                                               shape.page_bytes == kind.page_bytes &&
                                               shape.dtype == layout.dtype
                                         : shape.page_tokens == 0;
  if (!alike || !pages_fit || kind.head_dim != shape.head_dim || layout.has_v() != shape.has_v ||
      kind.head_group != shape.head_group) {
    return Error(Code::kIncompatible, "KV caches differ: " + std::string(name) + " has " +
                                          layout.ToString() + ", asked is a " + Describe(shape));
  }
  KVRELAY_RETURN_IF_ERROR(
      internal::CheckHeads(name, shard, shape.head_group, shape.head_begin, shape.head_end));
  return index;
}

}  // namespace

TokenRange StreamShape::units() const {
  if (page_tokens == 0) return tokens;
  return {tokens.begin / page_tokens, (tokens.end + page_tokens - 1) / page_tokens};
}

uint64_t StreamShape::bytes() const { return Rows(*this) * units().size() * row_bytes(); }

std::vector<StreamShape> CutStream(const StreamShape& shape, uint64_t max_bytes) {
  const TokenRange units = shape.units();
  const uint64_t unit_bytes = Rows(shape) * shape.row_bytes();
  const uint32_t unit_tokens = std::max(1U, shape.page_tokens);
  const uint64_t most = std::max<uint64_t>(1, max_bytes / std::max<uint64_t>(1, unit_bytes));
  std::vector<StreamShape> pieces;
  for (uint32_t begin = units.begin; begin < units.end;) {
    const auto end = static_cast<uint32_t>(std::min<uint64_t>(units.end, begin + most));
    StreamShape& piece = pieces.emplace_back(shape);
    piece.tokens.begin = std::max(shape.tokens.begin, begin * unit_tokens);
    piece.tokens.end =
        end == units.end ? shape.tokens.end : end * unit_tokens;  // inside the last page
    begin = end;
  }
  return pieces;
}

std::vector<float> StreamScales(const StreamShape& shape, const PullSide& owner) {
  std::vector<float> rows;
  if (internal::ScalesOf(owner).empty() || shape.dtype != owner.layout.dtype) return rows;
  const internal::ScaleOf scale(owner);
  const KvHeads held = owner.shard.heads(shape.head_group);
  for (const uint32_t layer : shape.layers) {
    for (uint64_t tensor = 0; tensor < TensorsPerLayer(shape); ++tensor) {
      for (uint32_t head = shape.head_begin; head < shape.head_end; ++head) {
        rows.push_back(scale(tensor == 1, layer - owner.shard.layer_begin, head - held.begin));
      }
    }
  }
  return rows;
}

Result<StreamChunks> StreamChunks::Make(StreamShape shape, uint64_t chunk_bytes,
                                        std::vector<float> scales) {
  if (!IsSane(shape)) return Error(Code::kInvalidArgument, "empty or absurd " + Describe(shape));
  if (chunk_bytes < shape.row_bytes()) {
    return Error(Code::kInvalidArgument, "chunks of " + std::to_string(chunk_bytes) +
                                             " bytes do not hold one token's row of " +
                                             std::to_string(shape.row_bytes()) + " bytes");
  }
  if (!scales.empty() && scales.size() != Rows(shape)) {
    return Error(Code::kInvalidArgument,
                 std::to_string(scales.size()) + " scales of a " + Describe(shape));
  }
  // A row of a segment fits into a chunk, so long rows make more segments.
  StreamChunks chunks;
  const uint64_t units = shape.units().size();
  const uint64_t units_fit = chunk_bytes / shape.row_bytes();
  const uint64_t wanted =
      shape.segment_tokens > 0 ? shape.segment_tokens / std::max(1U, shape.page_tokens) : units;
  const uint64_t per_segment = std::min({units, units_fit, wanted});
  chunks.units_per_segment_ = static_cast<uint32_t>(per_segment);
  chunks.rows_per_chunk_ = units_fit / per_segment;
  chunks.segments_ = static_cast<uint32_t>((units + per_segment - 1) / per_segment);
  const uint64_t per_segment_chunks =
      (Rows(shape) + chunks.rows_per_chunk_ - 1) / chunks.rows_per_chunk_;
  chunks.chunks_per_segment_ = static_cast<uint32_t>(per_segment_chunks);
  if (per_segment_chunks * chunks.segments_ > std::numeric_limits<uint32_t>::max()) {
    return Error(Code::kInvalidArgument, "too many chunks of " + std::to_string(chunk_bytes) +
                                             " bytes: " + Describe(shape));
  }
  chunks.shape_ = std::move(shape);
  chunks.scales_ = std::move(scales);
  return chunks;
}

uint32_t StreamChunks::count() const { return segments_ * chunks_per_segment_; }

uint64_t StreamChunks::bytes(uint32_t chunk) const {
  const Cut cut = CutOf(chunk);
  return cut.rows * cut.units.size() * shape_.row_bytes();
}

StreamChunks::Cut StreamChunks::CutOf(uint32_t chunk) const {
  const uint64_t first_row = chunk % chunks_per_segment_ * rows_per_chunk_;
  const TokenRange units = shape_.units();
  const uint32_t begin = units.begin + chunk / chunks_per_segment_ * units_per_segment_;
  return {first_row,
          std::min(rows_per_chunk_, Rows(shape_) - first_row),
          {begin, begin + std::min(units_per_segment_, units.end - begin)}};
}

KvExtent StreamChunks::ExtentOf(uint32_t chunk, uint32_t owner_layer_begin) const {
  const Cut cut = CutOf(chunk);
  const uint64_t last_row = cut.first_row + cut.rows - 1;
  const uint32_t layer = shape_.layers[last_row / (TensorsPerLayer(shape_) * Heads(shape_))];
  return {.tokens = std::min(cut.units.end * std::max(1U, shape_.page_tokens), shape_.tokens.end),
          .layers = layer - owner_layer_begin + 1};
}

Result<CopyPlan> StreamChunks::Plan(std::string_view name, const PullSide& cache, uint32_t chunk,
                                    bool pack) const {
  if (chunk >= count()) {
    return Error(Code::kInvalidArgument, "chunk " + std::to_string(chunk) + " of " +
                                             std::to_string(count()) + " of a " + Describe(shape_));
  }
  KVRELAY_ASSIGN_OR_RETURN(const uint32_t kind_index, CheckHolds(name, cache, shape_));
  const KvKind kind = cache.layout.kind(kind_index);
  const Cut cut = CutOf(chunk);
  const uint32_t page = std::max(1U, shape_.page_tokens);
  KVRELAY_ASSIGN_OR_RETURN(
      const internal::PlanSide in_cache,
      internal::SideOf(name, cache, kind_index, {cut.units.begin * page, cut.units.end * page}));

  // The chunk is a cache of one block that begins with the first of its units.
  const BlockId only_block = 0;
  internal::PlanSide in_chunk;
  in_chunk.row_bytes = shape_.row_bytes();
  in_chunk.unit_stride = in_chunk.row_bytes;
  in_chunk.head_stride = cut.units.size() * in_chunk.row_bytes;
  in_chunk.dtype = shape_.dtype;
  in_chunk.block_size = cut.units.size();
  in_chunk.blocks = std::span(&only_block, 1);
  in_chunk.first = cut.units.begin;
  const internal::PlanSide& src = pack ? in_cache : in_chunk;
  const internal::PlanSide& dst = pack ? in_chunk : in_cache;

  const bool casts = shape_.dtype != cache.layout.dtype || !scales_.empty() ||
                     (!internal::ScalesOf(cache).empty() && !cache.layout.opaque());
  if (casts) KVRELAY_RETURN_IF_ERROR(internal::CheckScalesKnown(name, cache));
  const internal::ScaleOf scale(cache);
  const KvHeads held = cache.shard.heads(shape_.head_group);
  CopyPlan plan;
  const auto groups = internal::AppendSegments(plan, src, dst, cut.units);
  // Rows of one tensor that are all there follow each other as tensors of a set; what is left of a
  // tensor at either end is a set of its own.
  for (uint64_t i = 0; i < cut.rows;) {
    const uint64_t row = cut.first_row + i;
    const auto head = static_cast<uint32_t>(row % Heads(shape_));
    internal::TensorSet set;
    set.heads = static_cast<uint32_t>(std::min<uint64_t>(Heads(shape_) - head, cut.rows - i));
    const uint64_t tensors =
        set.heads == Heads(shape_) ? (cut.rows - i) / Heads(shape_) : uint64_t{1};
    for (uint64_t t = 0; t < tensors; ++t, i += set.heads) {
      const uint64_t tensor = row / Heads(shape_) + t;
      const bool is_v = shape_.has_v && tensor % 2 == 1;
      const uint32_t layer =
          shape_.layers[tensor / TensorsPerLayer(shape_)] - cache.shard.layer_begin;
      const uint32_t first_head = shape_.head_begin - held.begin + head;
      const internal::SidePlace place =
          internal::PlaceOf(is_v ? cache.layout.v[layer] : cache.layout.k[layer], kind, first_head);
      const uint64_t at = i * in_chunk.head_stride;
      set.places.push_back(pack ? CopyPlace{place.region, 0, place.offset, at}
                                : CopyPlace{0, place.region, at, place.offset});
      for (uint32_t h = 0; casts && h < set.heads; ++h) {
        const float own = scale(is_v, layer, first_head + h);
        const float streams = scales_.empty() ? 1 : scales_[cut.first_row + i + h];
        KVRELAY_RETURN_IF_ERROR(
            internal::AddFactor(pack ? own : streams, pack ? streams : own, set.factors));
      }
    }
    internal::AppendBoxes(plan, src, dst, groups, std::move(set));
  }
  return plan;
}

Result<CopyPlan> StreamChunks::PlanPack(const PullSide& owner, uint32_t chunk) const {
  return Plan("owner", owner, chunk, /*pack=*/true);
}

Result<CopyPlan> StreamChunks::PlanUnpack(const PullSide& reader, uint32_t chunk) const {
  return Plan("reader", reader, chunk, /*pack=*/false);
}

}  // namespace kvrelay
