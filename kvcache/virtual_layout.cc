#include "kvcache/virtual_layout.h"

#include <algorithm>
#include <bit>
#include <numeric>
#include <string>
#include <utility>

namespace kvrelay {
namespace {

constexpr uint64_t kMostBytes = uint64_t{1} << 46;  // of addresses: half of what a process has

Status Wrong(const std::string& what) {
  return {Code::kInvalidArgument, "a virtual KV cache: " + what};
}

Status CheckShape(const VirtualKvShape& shape, const VirtualKvShape& first) {
  const std::pair<const char*, uint32_t> counts[] = {
      {"num_layers", shape.num_layers},
      {"num_kv_heads", shape.num_kv_heads},
      {"head_size", shape.head_size},
      {"max_batch_size", shape.max_batch_size},
      {"max_seq_len", shape.max_seq_len},
      {"block_size", shape.block_size},
      {"bytes of an element", SizeOf(shape.dtype)},
  };
  for (const auto& [name, count] : counts) {
    if (count == 0 || count > (1U << 24)) {
      return Wrong(std::string(name) + " = " + std::to_string(count));
    }
  }
  if ((shape.format != KvFormat::kNhd && shape.format != KvFormat::kHnd) ||
      (shape.megacache && shape.format == KvFormat::kHnd)) {
    return Wrong(std::string(KvFormatName(shape.format)) +
                 (shape.megacache ? " with the layers inside a token" : ""));
  }
  if (!std::has_single_bit(shape.page_size)) {
    return Wrong("page_size = " + std::to_string(shape.page_size) + " is no power of two");
  }
  if (shape.max_batch_size != first.max_batch_size || shape.max_seq_len != first.max_seq_len ||
      shape.block_size != first.block_size) {
    return Wrong("ranks with different rows or blocks");
  }
  return Status::Ok();
}

// Tensors that have a range of addresses of their own.
uint64_t Ranges(const VirtualKvShape& shape) {
  if (shape.megacache) return 1;
  return uint64_t{2} * shape.num_layers * (shape.format == KvFormat::kHnd ? shape.num_kv_heads : 1);
}

// A token's, in all ranges.
uint64_t TokenBytes(const VirtualKvShape& shape) {
  return uint64_t{2} * shape.num_layers * shape.num_kv_heads * shape.head_size *
         SizeOf(shape.dtype);
}

// A block's, in one range.
uint64_t BlockBytes(const VirtualKvShape& shape) {
  return TokenBytes(shape) / Ranges(shape) * shape.block_size;
}

VirtualLayout LayOut(const VirtualKvShape& shape, uint32_t row_blocks) {
  VirtualLayout layout;
  layout.page_bytes = shape.page_size;
  layout.rows = shape.max_batch_size;
  layout.row_blocks = row_blocks;
  layout.max_seq_len = shape.max_seq_len;
  layout.ranges = static_cast<uint32_t>(Ranges(shape));
  layout.row_bytes = row_blocks * BlockBytes(shape);
  KvLayout& kv = layout.kv;
  kv.dtype = shape.dtype;
  kv.format = shape.format;
  kv.block_size = shape.block_size;
  kv.num_blocks = shape.max_batch_size * row_blocks;
  kv.kv_heads = shape.num_kv_heads;
  kv.head_dim = shape.head_size;
  kv.block_stride = BlockBytes(shape);
  kv.token_stride = kv.block_stride / shape.block_size;
  const uint64_t range_bytes = layout.rows * layout.row_bytes;
  kv.head_stride = shape.format == KvFormat::kHnd ? range_bytes : kv.row_bytes();
  // From one tensor to the next: K of layer 0, V of layer 0, K of layer 1, ...
  const uint64_t stride = shape.format == KvFormat::kHnd || shape.megacache
                              ? kv.kv_heads * kv.head_stride
                              : range_bytes;
  for (uint32_t layer = 0; layer < shape.num_layers; ++layer) {
    kv.k.push_back({.region = 0, .offset = 2 * layer * stride});
    kv.v.push_back({.region = 0, .offset = (2 * layer + 1) * stride});
  }
  return layout;
}

}  // namespace

Result<std::vector<VirtualLayout>> VirtualLayout::Make(std::span<const VirtualKvShape> ranks) {
  if (ranks.empty()) return Error(Wrong("no ranks"));
  // Blocks that are whole pages together. Pages are powers of two, so these are, too, and the most
  // of them is a multiple of all.
  uint64_t together = 1;
  for (const VirtualKvShape& shape : ranks) {
    KVRELAY_RETURN_IF_ERROR(CheckShape(shape, ranks.front()));
    together = std::max(together, shape.page_size / std::gcd(shape.page_size, BlockBytes(shape)));
  }
  const VirtualKvShape& first = ranks.front();
  const uint64_t blocks = (uint64_t{first.max_seq_len} + first.block_size - 1) / first.block_size;
  const uint64_t row_blocks = (blocks + together - 1) / together * together;
  std::vector<VirtualLayout> layouts;
  for (const VirtualKvShape& shape : ranks) {
    const uint64_t token_bytes = TokenBytes(shape);
    const uint64_t tokens = row_blocks * shape.block_size * shape.max_batch_size;
    if (row_blocks * shape.max_batch_size > (1U << 31) || tokens > kMostBytes / token_bytes) {
      return Error(Wrong(std::to_string(shape.max_batch_size) + " rows of " +
                         std::to_string(shape.max_seq_len) + " tokens of " +
                         std::to_string(token_bytes) + " bytes are too much to address"));
    }
    layouts.push_back(LayOut(shape, static_cast<uint32_t>(row_blocks)));
    KVRELAY_RETURN_IF_ERROR(
        layouts.back().kv.Validate(std::vector<uint64_t>{layouts.back().bytes()}));
  }
  return layouts;
}

}  // namespace kvrelay
