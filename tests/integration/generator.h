// Many requests to one decode daemon, and what one process would have answered.
#pragma once

#include <array>
#include <cstdint>
#include <memory>
#include <nlohmann/json.hpp>
#include <span>
#include <string>
#include <vector>

#include "base/status.h"
#include "engine/engine.h"
#include "proto/messages.h"

namespace kvrelay::integration {

struct Reply {
  std::vector<uint32_t> token_ids;
  nlohmann::json summary;  // timing_ms, kv, finish_reason, ...
};

// Blocks until the answer is complete, at most `timeout_ms` of the request and a little.
Result<Reply> Ask(const std::string& endpoint, proto::Generate request);

// Each request on a thread of its own, `at_once` at a time; replies in the order of the requests.
std::vector<Result<Reply>> AskAll(const std::string& endpoint,
                                  const std::vector<proto::Generate>& requests, size_t at_once);

// The same requests in this process: TP 1, no transfer, no relay.
class Reference {
 public:
  explicit Reference(const std::string& model_dir);
  std::vector<std::vector<uint32_t>> Generate(const std::vector<proto::Generate>& requests);

 private:
  std::unique_ptr<engine::Engine> engine_;
};

// `length` ids of readable text that differ from those of another `salt`.
std::vector<uint32_t> Text(size_t length, size_t salt);

// A greedy request for `max_new_tokens`, eos ignored.
proto::Generate Greedy(std::vector<uint32_t> system_ids, std::vector<uint32_t> token_ids,
                       uint32_t max_new_tokens);

// Lengths of system prompts in blocks of 16: none, whole blocks, a tail of 13.
inline constexpr std::array<size_t, 3> kSystemLengths = {0, 64, 77};

// A greedy request for each of `lengths`, all behind the same system prompt.
std::vector<proto::Generate> GreedyOfLengths(std::span<const size_t> lengths, size_t system_length,
                                             uint32_t max_new_tokens);

}  // namespace kvrelay::integration
