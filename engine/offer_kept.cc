// What the decode engine still has of a conversation, for the prefill worker that computes its next
// turn: a lease that lives as long as the fetch.
#include <glog/logging.h>

#include <span>
#include <utility>

#include "engine/decode_worker.h"
#include "engine/fingerprint.h"

namespace kvrelay::engine {

// Without the lease the worker computes everything; what is held here is not pulled all the same.
void DecodeWorker::OfferKept(const ActivePtr& active, const std::shared_ptr<Admission>& admission) {
  const uint32_t tokens = admission->kept.tokens;
  const uint32_t block_size = engine_.runner().block_size();
  const Conversation& conversation = *admission->kept.conversation;
  active->compute_ms = conversation.compute_ms;
  active->computed_tokens = conversation.computed_tokens;
  const std::vector<uint32_t> prompt = active->Prompt();
  proto::TicketPart part{.lease = {},
                         .hash = PromptHash(engine_.fingerprint(), std::span(prompt).first(tokens)),
                         .first_token = 0,
                         .tokens = tokens};
  agent::OfferRequest request{
      .blocks = {conversation.Share(0, (tokens + block_size - 1) / block_size), 0},
      .first_token = 0,
      .tokens = tokens,
      .hash = part.hash,
      .prefix = false,
      .finished = true,
      .scales = {}};
  agent_.owner().Offer(std::move(request),
                       [this, active, admission, part](const Result<LeaseId>& lease) mutable {
                         if (lease.has_value() && active->over) {
                           agent_.owner().Withdraw(*lease, "not_needed");
                         }
                         if (active->over) return;
                         if (!lease.has_value()) {
                           LOG(INFO) << "request " << active->request_id
                                     << ": what is kept of its conversation is not offered: "
                                     << lease.error().ToString();
                           return StartFetch(active, admission, {});
                         }
                         active->kept = part.lease = *lease;
                         StartFetch(active, admission, {PublishKept(active, part)});
                       });
}

// The KV is there: the lease says so on every rank before its ticket leaves.
proto::Reuse DecodeWorker::PublishKept(const ActivePtr& active,
                                       const proto::TicketPart& part) const {
  for (uint32_t rank = 0; rank < agent_.num_ranks(); ++rank) {
    const auto writer = agent_.Writer(rank, part.lease);
    if (writer) writer->Publish({part.tokens, part.tokens, 0});
  }
  return {.ticket = {.owner = agent_.engine(),
                     .incarnation = agent_.incarnation(),
                     .front = agent_.endpoint(),
                     .model = engine_.fingerprint(),
                     .prompt = part,
                     .prefixes = {}},
          .dtype = engine_.runner().ranks().front().layout.dtype,
          .priority = active->priority};
}

void DecodeWorker::WithdrawKept(const ActivePtr& active) {
  agent_.owner().Withdraw(std::exchange(active->kept, {}), "not_needed");
}

}  // namespace kvrelay::engine
