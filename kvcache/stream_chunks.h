// The canonical stream of a packed read: what both sides agree on when neither can reach the
// other's memory, and the plans that pack it out of the owner's cache and unpack it into the
// reader's.
#pragma once

#include <cstdint>
#include <string_view>
#include <vector>

#include "base/status.h"
#include "kvcache/copy_plan.h"
#include "kvcache/layout.h"
#include "kvcache/lease_record.h"
#include "kvcache/plan_pull.h"

namespace kvrelay {

// What one packed read asks for, in the model's coordinates. Stream order: [segment][layer][K or
// V][head][token][dim]; of opaque pages: [segment][layer][K or V][head][page].
struct StreamShape {
  std::vector<uint32_t> layers;  // global, ascending; of one kind on either side
  uint32_t head_group = 0;
  uint32_t head_begin = 0;  // global KV heads
  uint32_t head_end = 0;
  TokenRange tokens;
  uint32_t segment_tokens = 0;  // tokens of each segment, whole pages; 0: all in one
  DType dtype = DType::kFp32;   // of the stream's numbers
  uint32_t head_dim = 0;
  bool has_v = true;
  uint32_t page_tokens = 0;  // opaque pages: tokens of each, and its bytes; else 0
  uint64_t page_bytes = 0;
  bool operator==(const StreamShape&) const = default;

  uint64_t row_bytes() const {  // of one head and token, or page
    return page_tokens > 0 ? page_bytes : uint64_t{head_dim} * SizeOf(dtype);
  }
  TokenRange units() const;  // tokens, or the pages that hold them
  uint64_t bytes() const;
};

// What a reader asks an owner for: everything of one head range that both hold, as few streams as
// there are kinds of layers. The stream carries the owner's numbers as they are stored, unless
// neither side has scales and the reader's are smaller: then it carries the reader's. Either way
// the reader's cache ends up with the bits that PlanPull gives. Errors as PlanPull.
Result<std::vector<StreamShape>> StreamsOf(const PullSide& owner, const PullSide& reader,
                                           const PullSource& source, TokenRange tokens);

// The same stream as several, one behind the other, each of at most `max_bytes`, or of one token or
// page.
std::vector<StreamShape> CutStream(const StreamShape& shape, uint64_t max_bytes);

// The scales of a stream that carries `owner`'s stored numbers, one for each of its rows [layer][K
// or V][head]; none where it carries values.
std::vector<float> StreamScales(const StreamShape& shape, const PullSide& owner);

// The same stream cut into chunks of at most `chunk_bytes`, each whole rows of (layer, K|V, head)
// of one segment; where such a row would be longer than that, segments are shorter. Both sides
// derive the same chunks from the same numbers.
class StreamChunks {
 public:
  // kInvalidArgument when the shape is empty or absurd, chunk_bytes is smaller than one token's row
  // (or one page), or there are scales but not one for each row.
  static Result<StreamChunks> Make(StreamShape shape, uint64_t chunk_bytes,
                                   std::vector<float> scales = {});

  uint32_t count() const;
  uint64_t bytes(uint32_t chunk) const;
  // What must be computed before the chunk can be packed by an owner whose layers begin with
  // `owner_layer_begin`.
  KvExtent ExtentOf(uint32_t chunk, uint32_t owner_layer_begin) const;
  const StreamShape& shape() const { return shape_; }

  // Owner: cache -> chunk buffer (dst region 0). Reader: chunk buffer (src region 0) -> cache.
  // Errors as PlanPull.
  Result<CopyPlan> PlanPack(const PullSide& owner, uint32_t chunk) const;
  Result<CopyPlan> PlanUnpack(const PullSide& reader, uint32_t chunk) const;

 private:
  // Rows [first_row, first_row + rows) of one segment, the same units of each.
  struct Cut {
    uint64_t first_row = 0;
    uint64_t rows = 0;
    TokenRange units;
  };
  Cut CutOf(uint32_t chunk) const;
  Result<CopyPlan> Plan(std::string_view name, const PullSide& cache, uint32_t chunk,
                        bool pack) const;

  StreamShape shape_;
  std::vector<float> scales_;
  uint64_t rows_per_chunk_ = 1;
  uint32_t units_per_segment_ = 1;
  uint32_t segments_ = 1;
  uint32_t chunks_per_segment_ = 1;
};

}  // namespace kvrelay
