// What one worker's KV cache looks like in memory: dims and byte strides. NHD, HND and MLA are just
// strides.
//
// Address of one element row (head_dim values of one token and one head):
//   region(place.region) + place.offset + block * block_stride + head * head_stride + token *
//   token_stride
// with place = k[layer] or v[layer], head counted inside this worker's shard, token inside the
// block.
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

enum class DType : uint8_t { kFp32 = 0, kFp16 = 1, kBf16 = 2 };
uint32_t SizeOf(DType dtype);             // bytes
std::string_view DTypeName(DType dtype);  // "fp32", "fp16", "bf16"
Result<DType> DTypeFromName(std::string_view name);

// How a block is ordered inside; only names a set of strides. kMla: one latent "head", no V, never
// sliced.
enum class KvFormat : uint8_t { kNhd = 0, kHnd = 1, kMla = 2 };
std::string_view KvFormatName(KvFormat format);  // "nhd", "hnd", "mla"
Result<KvFormat> KvFormatFromName(std::string_view name);

// Where block 0, head 0, token 0 of one layer's K (or V) lies.
struct TensorPlace {
  RegionId region = 0;
  uint64_t offset = 0;  // bytes from the region's start
  bool operator==(const TensorPlace&) const = default;
};

struct KvLayout {
  DType dtype = DType::kFp32;
  KvFormat format = KvFormat::kNhd;
  uint32_t block_size = 0;  // tokens per block
  uint32_t num_blocks = 0;
  uint32_t kv_heads = 0;       // held by this worker (its shard), not by the model
  uint32_t head_dim = 0;       // elements of one head's K row; V's row is as long
  uint64_t block_stride = 0;   // bytes
  uint64_t head_stride = 0;    // bytes
  uint64_t token_stride = 0;   // bytes
  std::vector<TensorPlace> k;  // one per layer of this worker's shard
  std::vector<TensorPlace> v;  // the same, or empty when the format has no V (MLA)

  uint32_t layers() const { return static_cast<uint32_t>(k.size()); }
  bool has_v() const { return !v.empty(); }
  uint64_t row_bytes() const { return uint64_t{head_dim} * SizeOf(dtype); }
  // K and V of one token over all layers and heads of this shard.
  uint64_t token_bytes() const { return row_bytes() * kv_heads * (k.size() + v.size()); }
  bool operator==(const KvLayout&) const = default;

  // A densely packed cache in one region: per layer all K blocks, then all V blocks.
  static KvLayout Dense(KvFormat format, DType dtype, uint32_t layers, uint32_t kv_heads,
                        uint32_t head_dim, uint32_t block_size, uint32_t num_blocks);
  // Bytes of the region that Dense needs.
  uint64_t dense_bytes() const;
  // Layouts come from peers too: every address that the layout can name must lie inside its region
  // (lengths in bytes by RegionId), counts are bounded, arithmetic does not overflow, rows do not
  // overlap by strides shorter than a row.
  Status Validate(std::span<const uint64_t> region_bytes) const;
  std::string ToString() const;  // "fp32 nhd 4 layers x 2 heads x 32, blocks of 16 x 512"
};

}  // namespace kvrelay
