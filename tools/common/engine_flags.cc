#include "tools/common/engine_flags.h"

#include "proto/limits.h"

namespace kvrelay::tools {
namespace {

constexpr std::string_view kDefaultCache = "256MiB";

}  // namespace

void AddEngineFlags(FlagSet& flags, EngineFlags* engine) {
  engine->kv_blocks = ParseBlockBudget(kDefaultCache).value();
  flags.Section("Model and cache");
  flags.Text(
      "model", &engine->model, "DIR",
      "Hugging Face Llama folder: config.json, safetensors, and for text a byte-level tokenizer");
  flags.Whole("tp", &engine->tp, 1, proto::kMaxRanks, "tensor-parallel ranks; each is a thread");
  flags.Choice("device", &engine->device, {"cpu"}, "where the model runs");
  flags.Choice("kv_layout", &engine->kv_layout, {"nhd", "hnd"},
               "order inside a cache block: token before head, or head before token");
  flags.Choice("kv_dtype", &engine->kv_dtype, {"auto", "fp32", "fp16", "bf16"},
               "type of the cache's values; auto is fp32");
  flags.Whole("block_size", &engine->block_size, 1, proto::kMaxBlockSize,
              "tokens in a cache block");
  flags.Custom(
      "kv_blocks", "N|SIZE", std::string(kDefaultCache),
      [engine](std::string_view text) -> Status {
        KVRELAY_ASSIGN_OR_RETURN(engine->kv_blocks, ParseBlockBudget(text));
        return Status::Ok();
      },
      "cache blocks, or the bytes they may take over all ranks");
  flags.Whole("max_cached_system_prompts", &engine->max_cached_system_prompts, 0, 1U << 20,
              "system prompts whose KV is kept for later requests");
  flags.Choice("relay", &engine->relay, {"auto", "on", "off"},
               "attention that reads a shared system prompt once for all its requests");

  flags.Section("Work");
  flags.Whole("threads", &engine->threads, 0, 1024,
              "threads of all ranks together; 0: as many as this process may use");
  flags.Whole("prefill_chunk", &engine->prefill_chunk, 1, 1U << 20,
              "prompt tokens computed in one step");
  flags.Whole("max_batch", &engine->max_batch, 1, 1U << 16, "requests computed in one step");
}

}  // namespace kvrelay::tools
