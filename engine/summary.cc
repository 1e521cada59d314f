#include "engine/summary.h"

#include <nlohmann/json.hpp>

namespace kvrelay::engine {
namespace {

double Between(TimePoint from, TimePoint to) {
  return from == TimePoint() || to == TimePoint() ? 0 : ToMillis(to - from);
}

}  // namespace

TransferSummary LocalTransfer(const Outcome& outcome) {
  TransferSummary local;
  local.prefix_hit = outcome.prefix_hit;
  local.computed_tokens = outcome.computed_tokens;
  local.prefill_ms = Between(outcome.admitted, outcome.prompt_done);
  return local;
}

std::string SummaryJson(const std::string& request_id, const Outcome& outcome,
                        const TransferSummary& transfer) {
  const nlohmann::ordered_json json = {{"request_id", request_id},
                                       {"finish_reason", FinishReasonName(outcome.reason)},
                                       {"timing_ms",
                                        {{"prefill", transfer.prefill_ms},
                                         {"reuse", transfer.reuse_ms},
                                         {"saved", transfer.saved_ms},
                                         {"handshake", transfer.handshake_ms},
                                         {"pull", transfer.pull_ms},
                                         {"ttft", Between(outcome.submitted, outcome.prompt_done)},
                                         {"total", Between(outcome.submitted, outcome.finished)}}},
                                       {"kv",
                                        {{"path", transfer.path},
                                         {"bytes_pulled", transfer.bytes_pulled},
                                         {"prefix_bytes_pulled", transfer.prefix_bytes_pulled},
                                         {"prefix_hit", transfer.prefix_hit},
                                         {"prompt_tokens", outcome.prompt_tokens},
                                         {"prefix_tokens", outcome.prefix_tokens},
                                         {"computed_tokens", transfer.computed_tokens},
                                         {"reused_tokens", transfer.reused_tokens},
                                         {"reuse_bytes", transfer.reuse_bytes}}},
                                       {"prefill", transfer.prefill},
                                       {"retries", transfer.retries},
                                       {"relay", outcome.relay ? "on" : "off"},
                                       {"relay_why", outcome.relay_why}};
  // The request id is the client's and may be any bytes.
  return json.dump(-1, ' ', false, nlohmann::json::error_handler_t::replace);
}

}  // namespace kvrelay::engine
