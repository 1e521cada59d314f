// What a prefill and a decode worker compute together, in one process: a prompt into a cache of one
// dtype, cast, and continued in a cache of another.
#pragma once

#include <cstdint>
#include <memory>
#include <span>
#include <string>

#include "engine/model_runner.h"
#include "proto/messages.h"

namespace kvrelay::integration {

class Handoff {
 public:
  Handoff(const std::string& model_dir, DType prefill, DType decode);

  // How much the model prefers another token than one of `answer`, all tokens before given: the
  // largest difference of logits between the best token and the answer's. 0: the answer is the
  // greedy one.
  float Regret(const proto::Generate& request, std::span<const uint32_t> answer);

 private:
  std::unique_ptr<engine::ModelRunner> prefill_;
  std::unique_ptr<engine::ModelRunner> decode_;
};

}  // namespace kvrelay::integration
