#include "kvcache/layout.h"

#include <algorithm>
#include <cmath>
#include <utility>

namespace kvrelay {
namespace {

// Far above any real cache; they bound what a peer's numbers can make us compute or allocate.
constexpr uint32_t kMaxLayers = 4096;
constexpr uint32_t kMaxHeads = 1U << 16;
constexpr uint32_t kMaxHeadDim = 1U << 20;
constexpr uint32_t kMaxBlockSize = 1U << 16;
constexpr uint32_t kMaxBlocks = 1U << 31;
constexpr uint32_t kMaxKinds = 64;
constexpr uint64_t kMaxStride = uint64_t{1} << 48;

Error Bad(const std::string& what) { return Error(Code::kInvalidArgument, "KV layout: " + what); }

Status CheckCount(std::string_view what, uint64_t value, uint64_t max) {
  if (value >= 1 && value <= max) return Status::Ok();
  return Bad(std::string(what) + " is " + std::to_string(value) + ", allowed are 1 to " +
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
Result<uint64_t> Extent(const KvLayout& layout, const KvKind& kind) {
  std::vector<Dim> dims = {{"head", kind.kv_heads, kind.head_stride},
                           {"block", kind.num_blocks, kind.block_stride}};
  uint64_t extent = kind.page_bytes;
  if (!layout.opaque()) {
    dims.push_back({"token", kind.block_size, kind.token_stride});
    extent = uint64_t{kind.head_dim} * SizeOf(layout.dtype);
  }
  std::stable_sort(dims.begin(), dims.end(),
                   [](const Dim& a, const Dim& b) { return a.stride < b.stride; });
  for (const Dim& dim : dims) {
    if (dim.stride > kMaxStride || dim.stride % SizeOf(layout.dtype) != 0) {
      return Bad(std::string(dim.name) + " stride " + std::to_string(dim.stride) + " is over " +
                 std::to_string(kMaxStride) + " or no multiple of the element size " +
                 std::to_string(SizeOf(layout.dtype)));
    }
    if (dim.count == 1) continue;
    if (dim.stride < extent) {
      return Bad(std::string(dim.name) + " stride " + std::to_string(dim.stride) +
                 " makes rows overlap, at least " + std::to_string(extent) + " is needed");
    }
    uint64_t reach = 0;
    if (__builtin_mul_overflow(dim.stride, dim.count - 1, &reach) ||
        __builtin_add_overflow(extent, reach, &extent)) {
      return Bad(std::to_string(dim.count) + " " + std::string(dim.name) + "s of stride " +
                 std::to_string(dim.stride) + " overflow");
    }
  }
  return extent;
}

// Bytes that one layer's K (or V) reaches.
Result<uint64_t> CheckKind(const KvLayout& layout, const KvKind& kind) {
  KVRELAY_RETURN_IF_ERROR(CheckCount("number of heads", kind.kv_heads, kMaxHeads));
  KVRELAY_RETURN_IF_ERROR(CheckCount("head dim", kind.head_dim, kMaxHeadDim));
  KVRELAY_RETURN_IF_ERROR(CheckCount("block size", kind.block_size, kMaxBlockSize));
  KVRELAY_RETURN_IF_ERROR(CheckCount("number of blocks", kind.num_blocks, kMaxBlocks));
  if (layout.opaque()) {
    KVRELAY_RETURN_IF_ERROR(CheckCount("page bytes", kind.page_bytes, kMaxStride));
  } else if (kind.page_bytes != 0) {
    return Bad("pages of " + std::to_string(kind.page_bytes) + " bytes, and not opaque");
  }
  if (layout.format == KvFormat::kMla && kind.kv_heads != 1) {
    return Bad("mla with " + std::to_string(kind.kv_heads) + " heads, it has one head");
  }
  return Extent(layout, kind);
}

Status CheckNumbers(std::string_view name, const std::vector<float>& scales, uint64_t needed) {
  if (scales.size() != needed) {
    return Bad(std::to_string(scales.size()) + " scales of " + std::string(name) + ", needed are " +
               std::to_string(needed));
  }
  for (const float scale : scales) {
    if (!(scale > 0) || !std::isnormal(scale)) {
      return Bad("a scale of " + std::string(name) + " is " + std::to_string(scale) +
                 ", no normal number above 0");
    }
  }
  return Status::Ok();
}

Status CheckOwnScales(const KvLayout& layout) {
  if (layout.scales.empty()) return Status::Ok();
  if (layout.scales.with_request) return Bad("scales, though each request has its own");
  return CheckScales(layout, layout.scales);
}

Status CheckPlace(const KvLayout& layout, const TensorPlace& place, const std::string& what,
                  uint64_t extent, std::span<const uint64_t> region_bytes) {
  if (place.region >= region_bytes.size()) {
    return Bad(what + " is in region " + std::to_string(place.region) + ", there are " +
               std::to_string(region_bytes.size()));
  }
  const uint64_t available = region_bytes[place.region];
  if (place.offset % SizeOf(layout.dtype) != 0 || place.offset > available ||
      extent > available - place.offset) {
    return Bad(what + " needs " + std::to_string(extent) + " bytes at offset " +
               std::to_string(place.offset) + " (a multiple of the element size " +
               std::to_string(SizeOf(layout.dtype)) + "), region " + std::to_string(place.region) +
               " has " + std::to_string(available));
  }
  return Status::Ok();
}

}  // namespace

Status CheckScales(const KvLayout& layout, const KvScales& scales) {
  uint64_t needed = layout.layers();
  if (scales.per_head) {
    needed = 0;
    for (uint32_t i = 0; i < layout.layers(); ++i) {
      needed += layout.kind(layout.kind_of(i)).kv_heads;
    }
  }
  KVRELAY_RETURN_IF_ERROR(CheckNumbers("K", scales.k, needed));
  return CheckNumbers("V", scales.v, layout.has_v() ? needed : 0);
}

uint32_t SizeOf(DType dtype) {
  switch (dtype) {
    case DType::kFp32:
      return 4;
    case DType::kFp16:
    case DType::kBf16:
      return 2;
    case DType::kFp8E4m3:
    case DType::kFp8E5m2:
    case DType::kInt8:
      return 1;
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
    case DType::kFp8E4m3:
      return "fp8_e4m3";
    case DType::kFp8E5m2:
      return "fp8_e5m2";
    case DType::kInt8:
      return "int8";
  }
  return "unknown";
}

Result<DType> DTypeFromName(std::string_view name) {
  for (const DType dtype :
       {DType::kFp32, DType::kFp16, DType::kBf16, DType::kFp8E4m3, DType::kFp8E5m2, DType::kInt8}) {
    if (name == DTypeName(dtype)) return dtype;
  }
  return Error(Code::kInvalidArgument, "unknown dtype \"" + std::string(name) +
                                           "\" (known: fp32, fp16, bf16, "
                                           "fp8_e4m3, fp8_e5m2, int8)");
}

std::string_view KvFormatName(KvFormat format) {
  switch (format) {
    case KvFormat::kNhd:
      return "nhd";
    case KvFormat::kHnd:
      return "hnd";
    case KvFormat::kMla:
      return "mla";
    case KvFormat::kOpaque:
      return "opaque";
  }
  return "unknown";
}

Result<KvFormat> KvFormatFromName(std::string_view name) {
  for (const KvFormat format :
       {KvFormat::kNhd, KvFormat::kHnd, KvFormat::kMla, KvFormat::kOpaque}) {
    if (name == KvFormatName(format)) return format;
  }
  return Error(Code::kInvalidArgument,
               "unknown KV layout \"" + std::string(name) + "\" (known: nhd, hnd, mla, opaque)");
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

KvKind KvLayout::kind(uint32_t index) const {
  if (index > 0) return more_kinds[index - 1];
  return {.head_group = 0,
          .window = window,
          .block_size = block_size,
          .num_blocks = num_blocks,
          .kv_heads = kv_heads,
          .head_dim = head_dim,
          .block_stride = block_stride,
          .head_stride = head_stride,
          .token_stride = token_stride,
          .page_bytes = page_bytes};
}

uint64_t KvLayout::token_bytes() const {
  const uint64_t tensors = has_v() ? 2 : 1;
  uint64_t sum = 0;
  for (uint32_t i = 0; i < layers(); ++i) {
    const KvKind own = kind(kind_of(i));
    const uint64_t row =
        opaque() ? own.page_bytes / own.block_size : uint64_t{own.head_dim} * SizeOf(dtype);
    sum += row * own.kv_heads * tensors;
  }
  return sum;
}

Status KvLayout::Validate(std::span<const uint64_t> region_bytes) const {
  if (SizeOf(dtype) == 0) return Bad("unknown dtype " + std::to_string(static_cast<int>(dtype)));
  if (format > KvFormat::kOpaque) {
    return Bad("unknown format " + std::to_string(static_cast<int>(format)));
  }
  KVRELAY_RETURN_IF_ERROR(CheckCount("number of layers", k.size(), kMaxLayers));
  KVRELAY_RETURN_IF_ERROR(CheckCount("number of kinds", num_kinds(), kMaxKinds));
  const bool needs_v = format == KvFormat::kNhd || format == KvFormat::kHnd;
  const bool no_v = format == KvFormat::kMla;
  if ((needs_v || (!no_v && has_v())) ? v.size() != k.size() : has_v()) {
    return Bad(std::string(KvFormatName(format)) + " with " + std::to_string(k.size()) +
               " K layers, " + std::to_string(v.size()) +
               " V layers (nhd and hnd: as many V as K; mla: no V; opaque: either)");
  }
  if (page_name.empty() == opaque()) {
    return Bad(std::string(KvFormatName(format)) + " with pages named \"" + page_name +
               "\" (opaque ones have a name, others none)");
  }
  if (!layer_kinds.empty() && layer_kinds.size() != k.size()) {
    return Bad(std::to_string(layer_kinds.size()) + " layers' kinds, there are " +
               std::to_string(k.size()) + " layers");
  }
  std::vector<uint64_t> extents;
  for (uint32_t i = 0; i < num_kinds(); ++i) {
    KVRELAY_ASSIGN_OR_RETURN(const uint64_t extent, CheckKind(*this, kind(i)));
    extents.push_back(extent);
  }
  for (uint32_t layer = 0; layer < layers(); ++layer) {
    const std::string number = std::to_string(layer);
    const uint32_t own = kind_of(layer);
    if (own >= extents.size()) {
      return Bad("layer " + number + " is of kind " + std::to_string(own) + " of " +
                 std::to_string(extents.size()));
    }
    KVRELAY_RETURN_IF_ERROR(
        CheckPlace(*this, k[layer], "K of layer " + number, extents[own], region_bytes));
    if (!has_v()) continue;
    KVRELAY_RETURN_IF_ERROR(
        CheckPlace(*this, v[layer], "V of layer " + number, extents[own], region_bytes));
  }
  return CheckOwnScales(*this);
}

std::string KvLayout::ToString() const {
  std::string text = std::string(DTypeName(dtype)) + " " + std::string(KvFormatName(format));
  if (opaque()) text += " \"" + page_name + "\"";
  text += " " + std::to_string(layers()) + " layers x ";
  for (uint32_t i = 0; i < num_kinds(); ++i) {
    const KvKind own = kind(i);
    if (i > 0) text += " + ";
    text += std::to_string(own.kv_heads) + " heads x " + std::to_string(own.head_dim) +
            ", blocks of " + std::to_string(own.block_size) + " x " +
            std::to_string(own.num_blocks);
    if (opaque()) text += ", pages of " + std::to_string(own.page_bytes) + " bytes";
    if (own.window > 0) text += ", window " + std::to_string(own.window);
  }
  return text;
}

}  // namespace kvrelay
