// What the flags say about an engine; shared by both daemons and by `generate --local`.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "base/clock.h"
#include "base/status.h"
#include "kvcache/layout.h"

namespace kvrelay::engine {

enum class RelayMode : uint8_t { kAuto, kOn, kOff };
std::string_view RelayModeName(RelayMode mode);  // "auto", "on", "off"
Result<RelayMode> RelayModeFromName(std::string_view name);

// kPaged: all blocks have memory from the start, and a request's lie anywhere. kVirtual: a
// request's blocks are contiguous, and have memory where its tokens are
// (kvcache/virtual_kv_cache.h).
enum class KvCacheKind : uint8_t { kPaged, kVirtual };
std::string_view KvCacheKindName(KvCacheKind kind);  // "paged", "virtual"
Result<KvCacheKind> KvCacheKindFromName(std::string_view name);

// Scales of a cache of one byte a number: for each KV head of a layer's K and V, for each of these
// tensors, or none.
enum class KvScaling : uint8_t { kHead, kTensor, kNone };
std::string_view KvScalingName(KvScaling scaling);  // "head", "tensor", "none"
Result<KvScaling> KvScalingFromName(std::string_view name);

// kDummy: the weights are made up, only config.json is read (Checkpoint::Dummy).
enum class LoadFormat : uint8_t { kAuto, kDummy };
std::string_view LoadFormatName(LoadFormat format);  // "auto", "dummy"
Result<LoadFormat> LoadFormatFromName(std::string_view name);

struct EngineOptions {
  std::string model_dir;
  LoadFormat load_format = LoadFormat::kAuto;
  uint32_t tp = 1;                  // tensor-parallel ranks, each a thread
  uint32_t pp = 1;                  // pipeline-parallel stages, of tp ranks each
  std::vector<uint32_t> pp_layers;  // of each stage; empty: as even as it goes
  KvCacheKind kv_cache = KvCacheKind::kPaged;
  uint64_t kv_page_bytes = uint64_t{64} << 10;  // of kVirtual: a power of two to 2 MiB
  KvFormat kv_layout = KvFormat::kNhd;          // kNhd or kHnd
  std::optional<DType> kv_dtype;                // nothing: "auto", the arithmetic's dtype
  KvScaling kv_scales = KvScaling::kHead;       // of fp8 and int8; measured at start
  uint32_t block_size = 16;                     // tokens
  uint32_t kv_blocks = 1024;                    // of each rank; used when kv_bytes is 0
  uint64_t kv_bytes = 0;               // of all ranks together: as many whole blocks as fit
  int threads = 0;                     // 0: as many as the process may use; shared by all ranks
  uint32_t max_batch = 64;             // requests that run at the same time
  uint32_t max_queue = 256;            // requests that wait
  uint32_t max_prompt_tokens = 0;      // 0: what the model's context allows
  uint32_t prefill_chunk = 256;        // prompt tokens per step, of all requests together
  RelayMode relay = RelayMode::kAuto;  // kOn: also for a single request
  bool enforce_eager = false;          // on GPUs: decode without CUDA graphs
  std::string attn_backend;            // "paged_attn"; empty: the best that can serve the model
  uint32_t max_cached_system_prompts = 100;
  // Prompts of live requests that begin with as many equal tokens share them as a system prompt's,
  // whether they name one or not; 0: only system prompts are shared.
  uint32_t auto_prefix_tokens = 64;
  // What is kept of answered conversations for their next turns, without system prompts; 0: nothing
  uint32_t conversation_blocks = 0;
  Duration conversation_ttl = Millis(300'000);  // since its last turn

  // kInvalidArgument names the flag and its value.
  Status Validate() const;
};

}  // namespace kvrelay::engine
