// What is asked of an engine, and what it answers.
#pragma once

#include <cstdint>
#include <functional>
#include <span>
#include <string_view>
#include <vector>

#include "base/clock.h"
#include "base/ids.h"
#include "base/status.h"
#include "engine/model_runner.h"
#include "engine/sampler.h"
#include "kvcache/block_pool.h"
#include "kvcache/conversation_store.h"
#include "kvcache/prefix_store.h"

namespace kvrelay::engine {

using RequestNumber = uint64_t;  // given by the engine, never 0, never reused

// Where a request's prompt KV comes from, and what follows it.
enum class RequestKind : uint8_t {
  kGenerate,  // computed here, then decoded here
  kPrefill,  // computed here for somebody else: admitted, held until Begin, finished when all KV is
             // written
  kDecode,   // computed elsewhere: admitted, held while the KV comes, decoded from Begin on
};

enum class FinishReason : uint8_t { kStop, kLength, kCancelled, kError };
std::string_view FinishReasonName(FinishReason reason);  // "stop", "length", "cancelled", "error"

// The blocks that a held request got. The tables are references of the callee's own: blocks that
// something still writes to are not used again, whatever became of the request.
struct Admission {
  uint32_t prefix_tokens = 0;             // whole blocks; 0: the prompt has no shared prefix
  std::vector<ContentHash> prefix_names;  // of its starts, as in SystemPrefix; the last is its own
  // kPrefill only. A kDecode request gets its prefix from the reader side, which finds room for it
  // in the pool by itself: as many blocks are left free here.
  bool prefix_cached = false;  // its KV is complete
  BlockTable prefix_blocks;    // requests that wait for the same prefix get the same blocks
  BlockTable blocks;           // of the tokens from prefix_tokens on, room for the answer included
  // kDecode only: of the first `held_tokens` (whole blocks, the prefix included) only the prefix is
  // still to come, the others' KV is in `blocks` from an earlier turn. All that the conversation
  // and the prompt have in common may be read there; null when that is less than a block.
  uint32_t held_tokens = 0;
  ConversationStore::Match kept{};
};

struct Outcome {
  Status status;  // ok for kStop and kLength
  FinishReason reason = FinishReason::kError;
  uint32_t prompt_tokens = 0;
  uint32_t prefix_tokens = 0;    // of them in the shared prefix
  uint32_t computed_tokens = 0;  // of them run here for it, a prefix that it waited for included
  bool prefix_hit = false;       // the prefix was there when the request was admitted
  bool relay = false;            // some step ran relay attention for it
  std::string relay_why;         // of the last step that decided so
  TimePoint submitted;
  TimePoint admitted;  // these are zero when it did not come so far
  TimePoint begun;
  TimePoint prompt_done;  // first token sampled, or (kPrefill) all KV written
  TimePoint finished;
};

struct Request {
  RequestKind kind = RequestKind::kGenerate;
  std::vector<uint32_t> system_ids;  // the prompt is the system ids followed by the token ids
  std::vector<uint32_t> token_ids;
  uint32_t max_new_tokens = 0;  // kPrefill: 0
  SamplingOptions sampling;
  std::vector<uint32_t>
      stop_ids;  // besides the model's eos ids; the id that stopped is part of the answer
  bool ignore_eos = false;
  TimePoint deadline = TimePoint::max();
  // kPrefill: of so many tokens at the start the KV may come from elsewhere until Begin. With them
  // comes the shared prefix, unless it is here: nobody waits for this request's.
  uint32_t reuse_tokens = 0;

  // All on the engine's thread, which computes nothing meanwhile: they hand over and return.
  std::function<void(RequestNumber, Admission)> on_admitted;                // held kinds only
  std::function<void(RequestNumber, std::span<const uint32_t>)> on_tokens;  // new ids, in order
  std::function<void(RequestNumber, const Outcome&)> on_done;  // exactly once, the last call

  uint32_t prompt_tokens() const {
    return static_cast<uint32_t>(system_ids.size() + token_ids.size());
  }
};

// Lets a held request run.
struct Begin {
  // kDecode: the reference to the shared prefix, null when there is none. The KV of all other
  // prompt tokens is in the admission's blocks; the last prompt token is run again (which stores
  // equal values) for its logits.
  PrefixRef prefix{};
  bool cast = false;  // kDecode: some numbers of its KV were converted on their way here
  // kDecode: once answered, the conversation is kept for its next turn: with these two, which count
  // this turn's, too. No number of its KV was ever converted.
  bool keep = false;
  double compute_ms = 0;
  uint64_t computed_tokens = 0;
  // kPrefill: the KV of so many tokens at the start is in the admission's blocks.
  uint32_t reused_tokens = 0;
  // kPrefill: told how far the prompt is, in its positions, from now on; of a shared prefix what is
  // done already is told at once, on the engine's thread, for every rank. May be empty.
  ProgressFn progress{};
};

// What bounds every request of an engine.
struct RequestLimits {
  uint32_t vocab_size = 0;
  uint32_t max_position = 0;
  uint32_t max_prompt_tokens = 0;
  uint32_t block_size = 0;
  uint32_t num_blocks = 0;
};

// Tokens of the prompt that are in the shared prefix: the whole blocks of the system ids. The
// prompt's last token is never one: it is run again on the decode side.
uint32_t SharedTokens(uint32_t system_tokens, uint32_t prompt_tokens, uint32_t block_size);
// Blocks behind the `shared` first tokens that a request needs to its very end. (The last token of
// the answer is never run.)
uint32_t OwnBlocks(const Request& request, uint32_t shared, uint32_t block_size);

// kInvalidArgument for what is malformed, kTooLarge (both numbers) for what could never run. Any
// thread.
Status CheckRequest(const Request& request, const RequestLimits& limits);

}  // namespace kvrelay::engine
