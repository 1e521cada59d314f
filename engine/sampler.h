// From logits to the next token.
#pragma once

#include <cstdint>
#include <span>

#include "base/status.h"

namespace kvrelay::engine {

struct SamplingOptions {
  double temperature = 0;  // 0: greedy
  double top_p = 1;        // of the probability mass, most likely first
  uint64_t seed = 0;

  // kInvalidArgument names the option and its value.
  Status Validate() const;
};

// The index of the largest logit, the lowest of equals.
uint32_t Greedy(std::span<const float> logits);

// The token for `position` of a sequence. The randomness is a function of (seed, position) alone,
// so that the result depends on neither batching nor what was sampled before. Equal probabilities
// rank by id. Logits that are NaN are never chosen, unless there is nothing else; the result is
// always below logits.size() (> 0).
uint32_t Sample(std::span<const float> logits, const SamplingOptions& options, uint32_t position);

}  // namespace kvrelay::engine
