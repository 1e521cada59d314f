#include "engine/engine_options.h"

#include "kvcache/sparse_memory.h"

namespace kvrelay::engine {

std::string_view RelayModeName(RelayMode mode) {
  switch (mode) {
    case RelayMode::kAuto:
      return "auto";
    case RelayMode::kOn:
      return "on";
    case RelayMode::kOff:
      return "off";
  }
  return "auto";
}

Result<RelayMode> RelayModeFromName(std::string_view name) {
  for (const RelayMode mode : {RelayMode::kAuto, RelayMode::kOn, RelayMode::kOff}) {
    if (name == RelayModeName(mode)) return mode;
  }
  return Error(Code::kInvalidArgument,
               "relay = " + std::string(name) + " is not one of auto, on, off");
}

std::string_view KvCacheKindName(KvCacheKind kind) {
  return kind == KvCacheKind::kVirtual ? "virtual" : "paged";
}

Result<KvCacheKind> KvCacheKindFromName(std::string_view name) {
  for (const KvCacheKind kind : {KvCacheKind::kPaged, KvCacheKind::kVirtual}) {
    if (name == KvCacheKindName(kind)) return kind;
  }
  return Error(Code::kInvalidArgument,
               "kv_cache = " + std::string(name) + " is not one of paged, virtual");
}

std::string_view KvScalingName(KvScaling scaling) {
  switch (scaling) {
    case KvScaling::kHead:
      return "head";
    case KvScaling::kTensor:
      return "tensor";
    case KvScaling::kNone:
      return "none";
  }
  return "head";
}

Result<KvScaling> KvScalingFromName(std::string_view name) {
  for (const KvScaling scaling : {KvScaling::kHead, KvScaling::kTensor, KvScaling::kNone}) {
    if (name == KvScalingName(scaling)) return scaling;
  }
  return Error(Code::kInvalidArgument,
               "kv_scales = " + std::string(name) + " is not one of head, tensor, none");
}

std::string_view LoadFormatName(LoadFormat format) {
  return format == LoadFormat::kDummy ? "dummy" : "auto";
}

Result<LoadFormat> LoadFormatFromName(std::string_view name) {
  for (const LoadFormat format : {LoadFormat::kAuto, LoadFormat::kDummy}) {
    if (name == LoadFormatName(format)) return format;
  }
  return Error(Code::kInvalidArgument,
               "load_format = " + std::string(name) + " is not one of auto, dummy");
}

Status EngineOptions::Validate() const {
  const auto in_range = [](const char* flag, uint64_t value, uint64_t min, uint64_t max) -> Status {
    if (value >= min && value <= max) return Status::Ok();
    return {Code::kInvalidArgument, std::string(flag) + " = " + std::to_string(value) +
                                        " is not from " + std::to_string(min) + " to " +
                                        std::to_string(max)};
  };
  if (model_dir.empty()) return {Code::kInvalidArgument, "no model folder is given"};
  if (kv_layout != KvFormat::kNhd && kv_layout != KvFormat::kHnd) {
    return {Code::kInvalidArgument, "kv_layout = " + std::string(KvFormatName(kv_layout)) +
                                        ": Llama models keep K and V (nhd, hnd)"};
  }
  KVRELAY_RETURN_IF_ERROR(in_range("tp", tp, 1, 64));
  KVRELAY_RETURN_IF_ERROR(in_range("pp", pp, 1, 64));
  KVRELAY_RETURN_IF_ERROR(in_range("tp * pp", uint64_t{tp} * pp, 1, 256));
  KVRELAY_RETURN_IF_ERROR(in_range("block_size", block_size, 1, 4096));
  if (kv_bytes == 0) KVRELAY_RETURN_IF_ERROR(in_range("kv_blocks", kv_blocks, 1, 1U << 24));
  if (kv_cache == KvCacheKind::kVirtual) {
    KVRELAY_RETURN_IF_ERROR(in_range("kv_page_bytes", kv_page_bytes, SparseMemory::kLeastPageBytes,
                                     SparseMemory::kMostPageBytes));
  }
  KVRELAY_RETURN_IF_ERROR(in_range("threads", static_cast<uint64_t>(threads), 0, 4096));
  KVRELAY_RETURN_IF_ERROR(in_range("max_batch", max_batch, 1, 1U << 16));
  KVRELAY_RETURN_IF_ERROR(in_range("max_queue", max_queue, 0, 1U << 20));
  KVRELAY_RETURN_IF_ERROR(in_range("prefill_chunk", prefill_chunk, 1, 1U << 20));
  return in_range("max_cached_system_prompts", max_cached_system_prompts, 0, 1U << 20);
}

}  // namespace kvrelay::engine
