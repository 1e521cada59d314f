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
  uint32_t computed_tokens = 0;  // by the prefill worker, in prefill_ms
  uint32_t reused_tokens = 0;    // that it took back from here, of an earlier turn
  uint64_t reuse_bytes = 0;
  double prefill_ms = 0;  // queue and computation in the prefill worker
  double reuse_ms = 0;    // of taking them
  double saved_ms = 0;    // their computation at the pace of the turns before, less reuse_ms
  double handshake_ms = 0;
  double pull_ms = 0;  // what was left of it when the prompt was computed
};

// {"request_id":...,"finish_reason":...,"timing_ms":{"prefill","reuse","saved","handshake","pull",
//  "ttft","total"},"kv":{"path","bytes_pulled","prefix_bytes_pulled","prefix_hit","prompt_tokens",
//  "prefix_tokens","computed_tokens","reused_tokens","reuse_bytes"},
//  "prefill","retries","relay","relay_why"}
std::string SummaryJson(const std::string& request_id, const Outcome& outcome,
                        const TransferSummary& transfer);
// Of a request that was computed here.
TransferSummary LocalTransfer(const Outcome& outcome);

}  // namespace kvrelay::engine
