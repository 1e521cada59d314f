#include "engine/request.h"

#include <algorithm>
#include <string>

namespace kvrelay::engine {
namespace {

Status CheckIds(const char* field, const std::vector<uint32_t>& ids, uint32_t vocab_size) {
  for (const uint32_t id : ids) {
    if (id < vocab_size) continue;
    return {Code::kInvalidArgument, std::string(field) + ": token id " + std::to_string(id) +
                                        " is outside the vocabulary of " +
                                        std::to_string(vocab_size)};
  }
  return Status::Ok();
}

}  // namespace

std::string_view FinishReasonName(FinishReason reason) {
  switch (reason) {
    case FinishReason::kStop:
      return "stop";
    case FinishReason::kLength:
      return "length";
    case FinishReason::kCancelled:
      return "cancelled";
    case FinishReason::kError:
      return "error";
  }
  return "error";
}

uint32_t SharedTokens(uint32_t system_tokens, uint32_t prompt_tokens, uint32_t block_size) {
  if (prompt_tokens == 0) return 0;
  return std::min(system_tokens, prompt_tokens - 1) / block_size * block_size;
}

uint32_t OwnBlocks(const Request& request, uint32_t shared, uint32_t block_size) {
  const uint32_t answer = request.max_new_tokens == 0 ? 0 : request.max_new_tokens - 1;
  return (request.prompt_tokens() - shared + answer + block_size - 1) / block_size;
}

Status CheckRequest(const Request& request, const RequestLimits& limits) {
  const uint64_t prompt = request.system_ids.size() + request.token_ids.size();
  if (prompt == 0) return {Code::kInvalidArgument, "the prompt has no tokens"};
  if (prompt > limits.max_prompt_tokens) {
    return {Code::kTooLarge, "the prompt has " + std::to_string(prompt) + " tokens, at most " +
                                 std::to_string(limits.max_prompt_tokens) + " are taken"};
  }
  if (request.kind != RequestKind::kPrefill && request.max_new_tokens == 0) {
    return {Code::kInvalidArgument, "max_new_tokens = 0: at least one token is generated"};
  }
  const uint64_t length = prompt + request.max_new_tokens;
  if (length > limits.max_position) {
    return {Code::kTooLarge, std::to_string(prompt) + " prompt tokens and " +
                                 std::to_string(request.max_new_tokens) +
                                 " new ones are more than the model's context of " +
                                 std::to_string(limits.max_position)};
  }
  KVRELAY_RETURN_IF_ERROR(CheckIds("system_ids", request.system_ids, limits.vocab_size));
  KVRELAY_RETURN_IF_ERROR(CheckIds("token_ids", request.token_ids, limits.vocab_size));
  KVRELAY_RETURN_IF_ERROR(request.sampling.Validate());
  const uint32_t shared = SharedTokens(static_cast<uint32_t>(request.system_ids.size()),
                                       request.prompt_tokens(), limits.block_size);
  const uint64_t blocks =
      OwnBlocks(request, shared, limits.block_size) + shared / limits.block_size;
  if (blocks > limits.num_blocks) {
    return {Code::kTooLarge, "the request needs " + std::to_string(blocks) + " blocks of " +
                                 std::to_string(limits.block_size) + " tokens, the cache has " +
                                 std::to_string(limits.num_blocks)};
  }
  return Status::Ok();
}

}  // namespace kvrelay::engine
