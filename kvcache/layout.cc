#include "kvcache/layout.h"

#include <algorithm>
#include <array>
#include <utility>

namespace kvrelay {
namespace {

// Far above any real cache; they bound what a peer's numbers can make us compute or allocate.
constexpr uint32_t kMaxLayers = 4096;
constexpr uint32_t kMaxHeads = 1U << 16;
constexpr uint32_t kMaxHeadDim = 1U << 20;
constexpr uint32_t kMaxBlockSize = 1U << 16;
constexpr uint32_t kMaxBlocks = 1U << 31;
constexpr uint64_t kMaxStride = uint64_t{1} << 48;

Status CheckCount(std::string_view what, uint64_t value, uint64_t max) {
  if (value >= 1 && value <= max) return Status::Ok();
  return Error(Code::kInvalidArgument, "KV layout: " + std::string(what) + " is " +
                                           std::to_string(value) + ", allowed are 1 to " +
                                           std::to_string(max));
}

uint64_t SaturatingMultiply(uint64_t a, uint64_t b) {
  uint64_t product = 0;
  return __builtin_mul_overflow(a, b, &product) ? UINT64_MAX : product;
}

struct Dim {
  std::string_view name;
  uint64_t count;
  uint64_t stride;
};

// Bytes from the first to behind the last byte of one layer's K (or V). Dims must nest: sorted by
// stride, each one steps over everything that the smaller ones reach, so that no two rows overlap.
Result<uint64_t> Extent(const KvLayout& layout) {
  std::array<Dim, 3> dims = {{{"token", layout.block_size, layout.token_stride},
                              {"head", layout.kv_heads, layout.head_stride},
                              {"block", layout.num_blocks, layout.block_stride}}};
  std::stable_sort(dims.begin(), dims.end(),
                   [](const Dim& a, const Dim& b) { return a.stride < b.stride; });
  uint64_t extent = layout.row_bytes();
  for (const Dim& dim : dims) {
    if (dim.stride > kMaxStride || dim.stride % SizeOf(layout.dtype) != 0) {
      return Error(Code::kInvalidArgument, "KV layout: " + std::string(dim.name) + " stride " +
                                               std::to_string(dim.stride) + " is over " +
                                               std::to_string(kMaxStride) +
                                               " or no multiple of the element size " +
                                               std::to_string(SizeOf(layout.dtype)));
    }
    if (dim.count == 1) continue;
    if (dim.stride < extent) {
      return Error(Code::kInvalidArgument,
                   "KV layout: " + std::string(dim.name) + " stride " + std::to_string(dim.stride) +
                       " makes rows overlap, at least " + std::to_string(extent) + " is needed");
    }
    uint64_t reach = 0;
    if (__builtin_mul_overflow(dim.stride, dim.count - 1, &reach) ||
        __builtin_add_overflow(extent, reach, &extent)) {
      return Error(Code::kInvalidArgument, "KV layout: " + std::to_string(dim.count) + " " +
                                               std::string(dim.name) + "s of stride " +
                                               std::to_string(dim.stride) + " overflow");
    }
  }
  return extent;
}

Status CheckPlace(const KvLayout& layout, const TensorPlace& place, const std::string& what,
                  uint64_t extent, std::span<const uint64_t> region_bytes) {
  if (place.region >= region_bytes.size()) {
    return Error(Code::kInvalidArgument, "KV layout: " + what + " is in region " +
                                             std::to_string(place.region) + ", there are " +
                                             std::to_string(region_bytes.size()));
  }
  const uint64_t available = region_bytes[place.region];
  if (place.offset % SizeOf(layout.dtype) != 0 || place.offset > available ||
      extent > available - place.offset) {
    return Error(Code::kInvalidArgument,
                 "KV layout: " + what + " needs " + std::to_string(extent) + " bytes at offset " +
                     std::to_string(place.offset) + " (a multiple of the element size " +
                     std::to_string(SizeOf(layout.dtype)) + "), region " +
                     std::to_string(place.region) + " has " + std::to_string(available));
  }
  return Status::Ok();
}

}  // namespace

uint32_t SizeOf(DType dtype) {
  switch (dtype) {
    case DType::kFp32:
      return 4;
    case DType::kFp16:
    case DType::kBf16:
      return 2;
  }
  return 0;  // a value that a peer made up; Validate refuses it
}

std::string_view DTypeName(DType dtype) {
  switch (dtype) {
    case DType::kFp32:
      return "fp32";
    case DType::kFp16:
      return "fp16";
    case DType::kBf16:
      return "bf16";
  }
  return "unknown";
}

Result<DType> DTypeFromName(std::string_view name) {
  for (const DType dtype : {DType::kFp32, DType::kFp16, DType::kBf16}) {
    if (name == DTypeName(dtype)) return dtype;
  }
  return Error(Code::kInvalidArgument,
               "unknown dtype \"" + std::string(name) + "\" (known: fp32, fp16, bf16)");
}

std::string_view KvFormatName(KvFormat format) {
  switch (format) {
    case KvFormat::kNhd:
      return "nhd";
    case KvFormat::kHnd:
      return "hnd";
    case KvFormat::kMla:
      return "mla";
  }
  return "unknown";
}

Result<KvFormat> KvFormatFromName(std::string_view name) {
  for (const KvFormat format : {KvFormat::kNhd, KvFormat::kHnd, KvFormat::kMla}) {
    if (name == KvFormatName(format)) return format;
  }
  return Error(Code::kInvalidArgument,
               "unknown KV layout \"" + std::string(name) + "\" (known: nhd, hnd, mla)");
}

KvLayout KvLayout::Dense(KvFormat format, DType dtype, uint32_t layers, uint32_t kv_heads,
                         uint32_t head_dim, uint32_t block_size, uint32_t num_blocks) {
  KvLayout layout;
  layout.dtype = dtype;
  layout.format = format;
  layout.block_size = block_size;
  layout.num_blocks = num_blocks;
  layout.kv_heads = kv_heads;
  layout.head_dim = head_dim;
  const uint64_t row = layout.row_bytes();
  layout.block_stride = SaturatingMultiply(row * kv_heads, block_size);
  if (format == KvFormat::kHnd) {
    layout.token_stride = row;
    layout.head_stride = row * block_size;
  } else {
    layout.head_stride = row;
    layout.token_stride = row * kv_heads;
  }
  const uint64_t tensor = SaturatingMultiply(layout.block_stride, num_blocks);
  uint64_t index = 0;
  for (uint32_t layer = 0; layer < layers; ++layer) {
    layout.k.push_back({0, SaturatingMultiply(tensor, index++)});
    if (format != KvFormat::kMla) layout.v.push_back({0, SaturatingMultiply(tensor, index++)});
  }
  return layout;
}

uint64_t KvLayout::dense_bytes() const {
  return SaturatingMultiply(SaturatingMultiply(block_stride, num_blocks), k.size() + v.size());
}

Status KvLayout::Validate(std::span<const uint64_t> region_bytes) const {
  if (SizeOf(dtype) == 0) {
    return Error(Code::kInvalidArgument,
                 "KV layout: unknown dtype " + std::to_string(static_cast<int>(dtype)));
  }
  if (format != KvFormat::kNhd && format != KvFormat::kHnd && format != KvFormat::kMla) {
    return Error(Code::kInvalidArgument,
                 "KV layout: unknown format " + std::to_string(static_cast<int>(format)));
  }
  KVRELAY_RETURN_IF_ERROR(CheckCount("number of layers", k.size(), kMaxLayers));
  KVRELAY_RETURN_IF_ERROR(CheckCount("number of heads", kv_heads, kMaxHeads));
  KVRELAY_RETURN_IF_ERROR(CheckCount("head dim", head_dim, kMaxHeadDim));
  KVRELAY_RETURN_IF_ERROR(CheckCount("block size", block_size, kMaxBlockSize));
  KVRELAY_RETURN_IF_ERROR(CheckCount("number of blocks", num_blocks, kMaxBlocks));
  const bool mla = format == KvFormat::kMla;
  if (v.size() != (mla ? 0 : k.size()) || (mla && kv_heads != 1)) {
    return Error(Code::kInvalidArgument,
                 "KV layout: " + std::string(KvFormatName(format)) + " with " +
                     std::to_string(k.size()) + " K layers, " + std::to_string(v.size()) +
                     " V layers and " + std::to_string(kv_heads) +
                     " heads (nhd and hnd: as many V as K; mla: no V, one head)");
  }
  KVRELAY_ASSIGN_OR_RETURN(const uint64_t extent, Extent(*this));
  for (size_t layer = 0; layer < k.size(); ++layer) {
    const std::string number = std::to_string(layer);
    KVRELAY_RETURN_IF_ERROR(
        CheckPlace(*this, k[layer], "K of layer " + number, extent, region_bytes));
    if (mla) continue;
    KVRELAY_RETURN_IF_ERROR(
        CheckPlace(*this, v[layer], "V of layer " + number, extent, region_bytes));
  }
  return Status::Ok();
}

std::string KvLayout::ToString() const {
  return std::string(DTypeName(dtype)) + " " + std::string(KvFormatName(format)) + " " +
         std::to_string(layers()) + " layers x " + std::to_string(kv_heads) + " heads x " +
         std::to_string(head_dim) + ", blocks of " + std::to_string(block_size) + " x " +
         std::to_string(num_blocks);
}

}  // namespace kvrelay
