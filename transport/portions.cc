#include "transport/portions.h"

namespace kvrelay::transport {

Result<std::optional<CopyPlan>> Portions::Take(const GuardWords& before,
                                               std::span<const uint64_t> peer_bytes,
                                               std::span<const uint64_t> local_bytes,
                                               TimePoint now) {
  before_ = before;
  KVRELAY_ASSIGN_OR_RETURN(Portion portion, next_(before));
  KVRELAY_RETURN_IF_ERROR(portion.plan.Validate(peer_bytes, local_bytes));
  last_ = portion.last;
  if (portion.plan.bytes() == 0 && !last_) {
    if (!waiting_since_) waiting_since_ = now;
    poll_at_ = now + PollPause(now - *waiting_since_);
    return std::nullopt;
  }
  waiting_since_.reset();
  return std::move(portion.plan);
}

}  // namespace kvrelay::transport
