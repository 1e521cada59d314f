// What one worker's KV cache looks like in memory: dims and byte strides. NHD, HND and MLA are just
// strides, and so are K and V in one tensor or two, all layers in one allocation, and padding.
//
// Address of one element row (head_dim values of one token and one head):
//   region(place.region) + place.offset + block * block_stride + head * head_stride + token *
//   token_stride
// with place = k[layer] or v[layer], strides of the layer's kind, head counted inside this worker's
// shard, token inside the block.
//
// Opaque pages: what one block holds of one head (K, or V, or both) is `page_bytes` bytes whose
// inside only their makers know (kept transposed, tiled, with scales between). They are at
//   region(place.region) + place.offset + block * block_stride + head * head_stride
// and can be cut by block and by head, never by token or element.
#pragma once

#include <cstdint>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "base/status.h"

namespace kvrelay {

using BlockId = uint32_t;
using RegionId = uint32_t;  // index into the owner's list of registered regions

enum class DType : uint8_t {
  kFp32 = 0,
  kFp16 = 1,
  kBf16 = 2,
  kFp8E4m3 = 3,
  kFp8E5m2 = 4,
  kInt8 = 5
};
uint32_t SizeOf(DType dtype);             // bytes; 0 for a value that does not exist
std::string_view DTypeName(DType dtype);  // "fp32", "fp16", "bf16", "fp8_e4m3", "fp8_e5m2", "int8"
Result<DType> DTypeFromName(std::string_view name);

// How a block is ordered inside; only names a set of strides. kMla: one latent "head", no V, never
// sliced. kOpaque: see above.
enum class KvFormat : uint8_t { kNhd = 0, kHnd = 1, kMla = 2, kOpaque = 3 };
std::string_view KvFormatName(KvFormat format);  // "nhd", "hnd", "mla", "opaque"
Result<KvFormat> KvFormatFromName(std::string_view name);

// Where block 0, head 0, token 0 of one layer's K (or V) lies.
struct TensorPlace {
  RegionId region = 0;
  uint64_t offset = 0;  // bytes from the region's start
  bool operator==(const TensorPlace&) const = default;
};

// Dims and strides that layers have in common.
struct KvKind {
  uint32_t head_group = 0;    // how the model's heads are split: KvShard::heads(head_group)
  uint32_t window = 0;        // tokens that these layers keep of a request, the last ones; 0: all
  uint32_t block_size = 0;    // tokens per block
  uint32_t num_blocks = 0;    //
  uint32_t kv_heads = 0;      // held by this worker (its shard), not by the model
  uint32_t head_dim = 0;      // elements of one head's K row; V's row is as long
  uint64_t block_stride = 0;  // bytes
  uint64_t head_stride = 0;   // bytes
  uint64_t token_stride = 0;  // bytes; not used by opaque pages
  uint64_t page_bytes = 0;    // of opaque pages, else 0
  bool operator==(const KvKind&) const = default;
};

// A stored number q means the value q * scale. Empty: all scales are 1.
struct KvScales {
  bool per_head = false;
  // One per layer, or, per head, one per layer and head that this worker holds, heads innermost.
  std::vector<float> k;
  std::vector<float> v;
  // Of a layout that has none of its own: each request's come beside its blocks
  // (kvcache/request_scales.h).
  bool with_request = false;
  bool empty() const { return k.empty() && v.empty(); }
  bool operator==(const KvScales&) const = default;
};

struct KvLayout {
  DType dtype = DType::kFp32;
  KvFormat format = KvFormat::kNhd;
  // The first kind of layers, and in almost all models the only one.
  uint32_t block_size = 0;     // tokens per block
  uint32_t num_blocks = 0;     //
  uint32_t kv_heads = 0;       // held by this worker (its shard), not by the model
  uint32_t head_dim = 0;       // elements of one head's K row; V's row is as long
  uint64_t block_stride = 0;   // bytes
  uint64_t head_stride = 0;    // bytes
  uint64_t token_stride = 0;   // bytes
  std::vector<TensorPlace> k;  // one per layer of this worker's shard
  std::vector<TensorPlace> v;  // the same, or empty: MLA, and opaque pages that hold K and V
  uint32_t window = 0;         // as in KvKind
  uint64_t page_bytes = 0;     // as in KvKind
  // What the inside of opaque pages is, in its makers' words: pages of different names do not mix.
  std::string page_name;
  // Models whose layers differ: kinds 1, 2, ..., and the kind of each layer of the shard (empty:
  // all 0).
  std::vector<KvKind> more_kinds;
  std::vector<uint32_t> layer_kinds;
  KvScales scales;

  uint32_t layers() const { return static_cast<uint32_t>(k.size()); }
  bool has_v() const { return !v.empty(); }
  bool opaque() const { return format == KvFormat::kOpaque; }
  uint64_t row_bytes() const { return uint64_t{head_dim} * SizeOf(dtype); }  // of the first kind
  // K and V of one token over all layers and heads of this shard. Of opaque pages: their part.
  uint64_t token_bytes() const;
  uint32_t num_kinds() const { return static_cast<uint32_t>(1 + more_kinds.size()); }
  KvKind kind(uint32_t index) const;  // index < num_kinds()
  uint32_t kind_of(uint32_t layer) const { return layer_kinds.empty() ? 0 : layer_kinds[layer]; }
  bool operator==(const KvLayout&) const = default;

  // A densely packed cache in one region: per layer all K blocks, then all V blocks.
  static KvLayout Dense(KvFormat format, DType dtype, uint32_t layers, uint32_t kv_heads,
                        uint32_t head_dim, uint32_t block_size, uint32_t num_blocks);
  // Bytes of the region that Dense needs.
  uint64_t dense_bytes() const;
  // Layouts come from peers too: every address that the layout can name must lie inside its region
  // (lengths in bytes by RegionId), counts are bounded, arithmetic does not overflow, rows do not
  // overlap by strides shorter than a row, scales are finite and above 0.
  Status Validate(std::span<const uint64_t> region_bytes) const;
  std::string ToString() const;  // "fp32 nhd 4 layers x 2 heads x 32, blocks of 16 x 512"
};

// Whether `scales` are as many as this layout needs, and normal numbers above 0. kInvalidArgument.
Status CheckScales(const KvLayout& layout, const KvScales& scales);

}  // namespace kvrelay
