#include "tools/common/engine_flags.h"

#include <algorithm>
#include <bit>
#include <optional>

#include "engine/cuda/platform_cuda.h"
#include "kvcache/sparse_memory.h"
#include "proto/limits.h"
#include "tools/common/flag_text.h"
#include "tools/common/units.h"

namespace kvrelay::tools {
namespace {

// A flag whose text is the name of an enum's value.
template <typename T, typename Target>
void AddNamed(FlagSet& flags, const std::string& name, const std::string& choices,
              std::string_view default_name, Target* target,
              Result<T> (*from_name)(std::string_view), const std::string& help) {
  const auto set = [target, from_name, choices](std::string_view text) -> Status {
    // The alternatives of `choices` are the enum's, without those that the flag does not offer.
    const Result<T> value = from_name(text);
    if (!value || ("|" + choices + "|").find("|" + std::string(text) + "|") == std::string::npos) {
      return Error(Code::kInvalidArgument, "needs one of " + choices);
    }
    *target = *value;
    return Status::Ok();
  };
  flags.Custom(name, choices, std::string(default_name), set, help);
}

// "cpu", or "cuda:0" and the like for each rank.
Status ParseDevices(std::string_view text, std::vector<int>* gpus) {
  constexpr uint64_t kMostGpus = 1024;
  constexpr std::string_view kCuda = "cuda:";
  gpus->clear();
  if (text == "cpu") return Status::Ok();
  for (size_t at = 0; at <= text.size();) {
    const size_t end = std::min(text.find(',', at), text.size());
    const std::string_view one = text.substr(at, end - at);
    const std::optional<uint64_t> ordinal =
        one.starts_with(kCuda) ? ParseWhole(one.substr(kCuda.size())) : std::nullopt;
    if (one != "cuda" && (!ordinal || *ordinal >= kMostGpus)) {
      return Error(Code::kInvalidArgument, "needs cpu, or cuda:N, or one such for each rank");
    }
    gpus->push_back(static_cast<int>(ordinal.value_or(0)));
    at = end + 1;
  }
  return Status::Ok();
}

Result<std::optional<DType>> AnyDTypeFromName(std::string_view name) {
  if (name == "auto") return std::optional<DType>();
  KVRELAY_ASSIGN_OR_RETURN(const DType dtype, DTypeFromName(name));
  return std::optional<DType>(dtype);
}

}  // namespace

Result<std::shared_ptr<const engine::Platform>> OpenPlatform(const EngineFlags& engine) {
  if (!engine.gpus.empty()) {
    return engine::cuda::OpenPlatform(
        {.ordinals = engine.gpus, .dtype = engine.dtype.value_or(DType::kBf16)});
  }
  if (engine.dtype.value_or(DType::kFp32) != DType::kFp32) {
    return Error(Code::kInvalidArgument, "--dtype=" + std::string(DTypeName(*engine.dtype)) +
                                             " is for --device=cuda:N; the host computes in fp32");
  }
  return engine::HostPlatform();
}

void AddEngineFlags(FlagSet& flags, EngineFlags* engine, const std::string& when) {
  engine::EngineOptions* o = &engine->options;
  flags.Section("Model and cache" + when);
  flags.Text(
      "model", &o->model_dir, "DIR",
      "Hugging Face folder of a Llama, Mistral, Qwen2, Qwen3 or DeepSeek-V2 without experts: "
      "config.json and safetensors; "
      "text needs a byte-level tokenizer");
  flags.Whole("tp", &o->tp, 1, proto::kMaxRanks, "tensor-parallel ranks; each is a thread");
  flags.Whole("pp", &o->pp, 1, proto::kMaxRanks,
              "pipeline-parallel stages, of --tp ranks each; each holds some of the layers");
  flags.Ids("pp_layers", &o->pp_layers, "layers of each stage; as even as it goes when empty");
  flags.Custom(
      "device", "cpu|cuda:N,...", "cpu",
      [engine](std::string_view text) { return ParseDevices(text, &engine->gpus); },
      "where the model and its cache are: the host, a GPU, or one for each rank");
  AddNamed(flags, "dtype", "auto|fp32|fp16|bf16", "auto", &engine->dtype, AnyDTypeFromName,
           "type of weights and arithmetic; auto is fp32 on the host and bf16 on GPUs");
  AddNamed(flags, "load_format", "auto|dummy", engine::LoadFormatName(o->load_format),
           &o->load_format, engine::LoadFormatFromName,
           "dummy makes weights up and reads config.json alone, for benchmarks");
  AddNamed(flags, "kv_cache", "paged|virtual", engine::KvCacheKindName(o->kv_cache), &o->kv_cache,
           engine::KvCacheKindFromName,
           "blocks with memory from the start, or a contiguous range of addresses for each request "
           "that gets memory page by page");
  flags.Custom(
      "kv_page_size", "SIZE", "64KiB",
      [o](std::string_view text) -> Status {
        const Result<uint64_t> bytes = ParseBytes(text);
        if (!bytes || !std::has_single_bit(*bytes) || *bytes < SparseMemory::kLeastPageBytes ||
            *bytes > SparseMemory::kMostPageBytes) {
          return Error(Code::kInvalidArgument, "needs 64KiB, 128KiB, 256KiB, 512KiB, 1MiB or 2MiB");
        }
        o->kv_page_bytes = *bytes;
        return Status::Ok();
      },
      "pages of a virtual cache, from 64KiB to 2MiB");
  AddNamed(flags, "kv_layout", "nhd|hnd", KvFormatName(o->kv_layout), &o->kv_layout,
           KvFormatFromName, "order inside a cache block: token before head, or head before token");
  AddNamed(flags, "kv_dtype", "auto|fp32|fp16|bf16|fp8_e4m3|fp8_e5m2|int8", "auto", &o->kv_dtype,
           AnyDTypeFromName, "type of the cache's values; auto is the arithmetic's");
  AddNamed(flags, "kv_scales", "head|tensor|none", engine::KvScalingName(o->kv_scales),
           &o->kv_scales, engine::KvScalingFromName,
           "scales of an fp8 or int8 cache, for each KV head or each layer's K and V, measured at "
           "start");
  flags.Whole("block_size", &o->block_size, 1, proto::kMaxBlockSize, "tokens in a cache block");
  flags.Custom(
      "kv_blocks", "N|SIZE", std::to_string(o->kv_blocks),
      [o](std::string_view text) -> Status {
        KVRELAY_ASSIGN_OR_RETURN(const BlockBudget budget, ParseBlockBudget(text));
        o->kv_blocks = static_cast<uint32_t>(budget.blocks);
        o->kv_bytes = budget.bytes;
        return Status::Ok();
      },
      "cache blocks, or the bytes they may take over all ranks, like 512MiB");
  flags.Whole("max_cached_system_prompts", &o->max_cached_system_prompts, 0, 1U << 20,
              "system prompts whose KV is kept for later requests");
  flags.Whole("auto_prefix_tokens", &o->auto_prefix_tokens, 0, proto::kMaxTokens,
              "prompts that begin with so many equal tokens at the same time share them like a "
              "system prompt, without naming one; 0: only system prompts are shared");
  AddNamed(flags, "relay", "auto|on|off", engine::RelayModeName(o->relay), &o->relay,
           engine::RelayModeFromName,
           "attention that reads a shared system prompt once for all its requests");
  flags.Switch("enforce_eager", &o->enforce_eager, "on a GPU: decodes without CUDA graphs");
  flags.Text("attn_backend", &o->attn_backend, "NAME",
             "attention backend to take, as `kvrelay backends` lists them; the best when empty");

  flags.Section("Work" + when);
  flags.Custom(
      "threads", "N", std::to_string(o->threads),
      [o](std::string_view text) -> Status {
        constexpr uint64_t kMost = 4096;
        const std::optional<uint64_t> threads = ParseWhole(text);
        if (!threads || *threads > kMost) {
          return Error(Code::kInvalidArgument, "needs a whole number from 0 to 4096");
        }
        o->threads = static_cast<int>(*threads);
        return Status::Ok();
      },
      "threads of all ranks together; 0: as many as this process may use");
  flags.Whole("prefill_chunk", &o->prefill_chunk, 1, proto::kMaxTokens,
              "prompt tokens computed in one step, of all requests together");
  flags.Whole("max_batch", &o->max_batch, 1, 1U << 16, "requests that run at the same time");
  flags.Whole("max_queue", &o->max_queue, 0, 1U << 20, "requests that wait");
  flags.Whole("max_prompt_tokens", &o->max_prompt_tokens, 0, proto::kMaxTokens,
              "longest prompt, the system prompt included; 0: what the model's context allows");
}

}  // namespace kvrelay::tools
