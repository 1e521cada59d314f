#include <algorithm>
#include <limits>
#include <string>
#include <string_view>

#include "kvcache/copy_plan.h"
#include "kvcache/plan_box.h"

namespace kvrelay {
namespace {

// Shapes come from peers. With these bounds nothing below overflows 64 bits.
constexpr uint32_t kMaxLayers = 1U << 12;
constexpr uint32_t kMaxHeads = 1U << 12;
constexpr uint32_t kMaxHeadDim = 1U << 16;
constexpr uint32_t kMaxTokens = 1U << 20;

bool IsRange(uint32_t begin, uint32_t end, uint32_t max) {
  return begin < end && end - begin <= max;
}

std::string Describe(const StreamShape& shape) {
  const auto range = [](uint32_t begin, uint32_t end) {
    return std::to_string(begin) + " to " + std::to_string(end);
  };
  return "stream of layers " + range(shape.layer_begin, shape.layer_end) + ", heads " +
         range(shape.head_begin, shape.head_end) + ", tokens " +
         range(shape.tokens.begin, shape.tokens.end) + ", head dim " +
         std::to_string(shape.head_dim) + ", " + std::string(DTypeName(shape.dtype)) +
         (shape.has_v ? "" : ", no V");
}

// Tensors of the stream: K and V of each layer count apart.
uint64_t TensorsPerLayer(const StreamShape& shape) { return shape.has_v ? 2 : 1; }

uint64_t Rows(const StreamShape& shape) {
  return uint64_t{shape.layer_end - shape.layer_begin} * TensorsPerLayer(shape) *
         (shape.head_end - shape.head_begin);
}

Status CheckHolds(std::string_view name, const PullSide& cache, const StreamShape& shape) {
  KVRELAY_RETURN_IF_ERROR(internal::CheckSide(name, cache));
  const KvLayout& layout = cache.layout;
  if (layout.dtype != shape.dtype || layout.head_dim != shape.head_dim ||
      layout.has_v() != shape.has_v) {
    return Error(Code::kIncompatible, "KV caches differ: " + std::string(name) + " has " +
                                          layout.ToString() + ", asked is a " + Describe(shape));
  }
  if (shape.layer_begin < cache.shard.layer_begin || shape.layer_end > cache.shard.layer_end()) {
    return Error(Code::kInvalidArgument, "layers " + std::to_string(shape.layer_begin) + " to " +
                                             std::to_string(shape.layer_end) + " are not held by " +
                                             std::string(name) + " " + cache.shard.ToString());
  }
  return internal::CheckHeads(name, cache.shard, shape.head_begin, shape.head_end);
}

}  // namespace

uint64_t StreamShape::bytes() const { return Rows(*this) * tokens.size() * row_bytes(); }

Result<StreamChunks> StreamChunks::Make(const StreamShape& shape, uint64_t chunk_bytes) {
  const bool sane = IsRange(shape.layer_begin, shape.layer_end, kMaxLayers) &&
                    IsRange(shape.head_begin, shape.head_end, kMaxHeads) &&
                    IsRange(shape.tokens.begin, shape.tokens.end, kMaxTokens) &&
                    shape.head_dim <= kMaxHeadDim && shape.row_bytes() > 0;
  if (!sane) return Error(Code::kInvalidArgument, "empty or absurd " + Describe(shape));
  if (chunk_bytes < shape.row_bytes()) {
    return Error(Code::kInvalidArgument, "chunks of " + std::to_string(chunk_bytes) +
                                             " bytes do not hold one token's row of " +
                                             std::to_string(shape.row_bytes()) + " bytes");
  }
  StreamChunks chunks;
  chunks.shape_ = shape;
  const uint64_t tokens = shape.tokens.size();
  const uint64_t tokens_fit = chunk_bytes / shape.row_bytes();
  if (tokens_fit >= tokens) {
    chunks.rows_per_chunk_ = tokens_fit / tokens;
    chunks.tokens_per_chunk_ = static_cast<uint32_t>(tokens);
  } else {
    chunks.tokens_per_chunk_ = static_cast<uint32_t>(tokens_fit);
    chunks.chunks_per_row_ = static_cast<uint32_t>((tokens + tokens_fit - 1) / tokens_fit);
  }
  if (Rows(shape) * chunks.chunks_per_row_ > std::numeric_limits<uint32_t>::max()) {
    return Error(Code::kInvalidArgument, "too many chunks of " + std::to_string(chunk_bytes) +
                                             " bytes: " + Describe(shape));
  }
  return chunks;
}

uint32_t StreamChunks::count() const {
  const uint64_t groups = (Rows(shape_) + rows_per_chunk_ - 1) / rows_per_chunk_;
  return static_cast<uint32_t>(groups * chunks_per_row_);
}

uint64_t StreamChunks::bytes(uint32_t chunk) const {
  const Cut cut = CutOf(chunk);
  return cut.rows * cut.tokens.size() * shape_.row_bytes();
}

StreamChunks::Cut StreamChunks::CutOf(uint32_t chunk) const {
  const uint64_t first_row = chunk / chunks_per_row_ * rows_per_chunk_;
  const uint32_t begin = shape_.tokens.begin + chunk % chunks_per_row_ * tokens_per_chunk_;
  return {first_row,
          std::min(rows_per_chunk_, Rows(shape_) - first_row),
          {begin, begin + std::min(tokens_per_chunk_, shape_.tokens.end - begin)}};
}

Result<CopyPlan> StreamChunks::Plan(std::string_view name, const PullSide& cache, uint32_t chunk,
                                    bool pack) const {
  if (chunk >= count()) {
    return Error(Code::kInvalidArgument, "chunk " + std::to_string(chunk) + " of " +
                                             std::to_string(count()) + " of a " + Describe(shape_));
  }
  KVRELAY_RETURN_IF_ERROR(CheckHolds(name, cache, shape_));
  const Cut cut = CutOf(chunk);
  KVRELAY_ASSIGN_OR_RETURN(const auto blocks, internal::BlocksOf(name, cache, cut.tokens));

  // The chunk seen as a cache of the same blocks: its block i is the i-th one that the tokens
  // touch, and the first of them begins as far before the chunk as the tokens begin inside it.
  const uint64_t row = shape_.row_bytes();
  const uint32_t block_size = cache.layout.block_size;
  const internal::PlanStrides in_chunk{block_size * row, cut.tokens.size() * row, row};
  const internal::PlanStrides in_cache = internal::StridesOf(cache.layout);
  const int64_t chunk_start = -static_cast<int64_t>(cut.tokens.begin % block_size * row);

  CopyPlan plan;
  plan.src_block_stride = pack ? in_cache.block : in_chunk.block;
  plan.dst_block_stride = pack ? in_chunk.block : in_cache.block;
  plan.pairs.reserve(blocks.size());
  for (uint32_t i = 0; i < blocks.size(); ++i) {
    plan.pairs.push_back(pack ? BlockPair{blocks[i], i} : BlockPair{i, blocks[i]});
  }
  const uint32_t heads = shape_.head_end - shape_.head_begin;
  for (const internal::TokenSpan& span : internal::CutAtBlocks(cut.tokens, block_size)) {
    uint32_t taken = 0;
    for (uint64_t i = 0; i < cut.rows; i += taken) {
      const uint64_t tensor = (cut.first_row + i) / heads;
      const auto head = static_cast<uint32_t>((cut.first_row + i) % heads);
      taken = static_cast<uint32_t>(std::min<uint64_t>(heads - head, cut.rows - i));
      const uint64_t layer =
          shape_.layer_begin - cache.shard.layer_begin + tensor / TensorsPerLayer(shape_);
      const bool is_v = shape_.has_v && tensor % 2 == 1;
      const internal::PlanPlace cache_place =
          internal::PlaceOf(cache.layout, is_v ? cache.layout.v[layer] : cache.layout.k[layer],
                            shape_.head_begin - cache.shard.head_begin + head);
      const internal::PlanPlace chunk_place{0,
                                            chunk_start + static_cast<int64_t>(i * in_chunk.head)};
      plan.boxes.push_back(
          pack ? MakeBox(in_cache, cache_place, in_chunk, chunk_place, taken, span, row)
               : MakeBox(in_chunk, chunk_place, in_cache, cache_place, taken, span, row));
    }
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
