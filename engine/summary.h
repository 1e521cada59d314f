// What the last answer to a request says besides ids and text; the same fields whether the KV was
// computed here or elsewhere.
#pragma once

#include <cstdint>
#include <string>

#include "engine/request.h"

namespace kvrelay::engine {

// How a request's KV came here. All zero for one that was computed here.
struct TransferSummary {
  std::string path = "local";  // "mapped", "ucx-packed"
  std::string prefill;         // endpoint of the worker used
  uint32_t retries = 0;
  uint64_t bytes_pulled = 0;  // the request's own tokens
  uint64_t prefix_bytes_pulled = 0;
  bool prefix_hit = false;
  double prefill_ms = 0;  // queue and computation in the prefill worker
  double handshake_ms = 0;
  double pull_ms = 0;  // what was left of it when the prompt was computed
};

// {"request_id":...,"finish_reason":...,"timing_ms":{"prefill","handshake","pull","ttft","total"},
//  "kv":{"path","bytes_pulled","prefix_bytes_pulled","prefix_hit","prompt_tokens","prefix_tokens"},
//  "prefill","retries","relay","relay_why"}
std::string SummaryJson(const std::string& request_id, const Outcome& outcome,
                        const TransferSummary& transfer);
// Of a request that was computed here.
TransferSummary LocalTransfer(const Outcome& outcome);

}  // namespace kvrelay::engine
