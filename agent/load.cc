#include "agent/load.h"

#include <utility>

namespace kvrelay::agent {

Load::Load(ReaderContext& context, PrefixTable& prefixes, LoadRequest request, Events events)
    : context_(context),
      prefixes_(prefixes),
      request_(std::move(request)),
      events_(std::move(events)) {}

void Load::Start() {
  const proto::Ticket& ticket = request_.ticket;
  prefix_done_ = ticket.prefixes.empty();
  context_.under_way.insert(shared_from_this());
  own_ = std::make_shared<EnginePull>(
      context_,
      EnginePullRequest{.owner = {ticket.front, ticket.incarnation},
                        .owner_engine = ticket.owner,
                        .part = ticket.prompt,
                        .blocks = std::move(request_.blocks),
                        .held_tokens = request_.held_tokens,
                        .priority = request_.priority,
                        .deadline = request_.deadline},
      EnginePull::Events{.finished =
                             [weak = weak_from_this()](const Result<PullStats>& stats) {
                               if (const auto self = weak.lock()) self->OnOwn(stats);
                             },
                         .drained =
                             [weak = weak_from_this()] {
                               const auto self = weak.lock();
                               if (!self) return;
                               // The pull is still on the stack: it goes with the closure.
                               self->context_.env.clock.CallAfter(
                                   {}, [pull = std::move(self->own_)] {});
                               self->own_drained_ = true;
                               self->ReportDrained();
                             }});
  own_->Start();
}

void Load::SetDestination(HeldTables blocks, uint32_t held_tokens) {
  if (!finished_) own_->SetDestination(std::move(blocks), held_tokens);
}

void Load::SetReady() {
  if (std::exchange(ready_, true) || finished_) return;
  own_->SetReady();
  const proto::Ticket& ticket = request_.ticket;
  if (ticket.prefixes.empty()) return;
  prefix_request_ = prefixes_.Acquire({.owner = {ticket.front, ticket.incarnation},
                                       .owner_engine = ticket.owner,
                                       .part = ticket.prefixes.front(),
                                       .names = std::move(request_.prefix_names),
                                       .deadline = request_.deadline},
                                      [weak = weak_from_this()](const Result<PrefixGrant>& grant) {
                                        const auto self = weak.lock();
                                        if (!self) return;
                                        self->prefix_request_ = 0;
                                        self->OnPrefix(grant);
                                      });
}

void Load::OnOwn(const Result<PullStats>& stats) {
  own_done_ = true;
  if (finished_) return;
  if (!stats.has_value()) return Fail(stats.error());
  result_.own = *stats;
  result_.cast = result_.cast || stats->cast;
  FinishIfComplete();
}

void Load::OnPrefix(const Result<PrefixGrant>& grant) {
  if (finished_) return;
  if (!grant.has_value()) return Fail(grant.error());
  prefix_done_ = true;
  result_.prefix = grant->prefix;
  result_.prefix_hit = !grant->pulled;
  result_.prefix_bytes = grant->stats.bytes;
  result_.cast = result_.cast || grant->prefix->cast;
  FinishIfComplete();
}

void Load::FinishIfComplete() {
  if (!own_done_ || !prefix_done_) return;
  finished_ = true;
  Report(std::move(result_));
}

void Load::Cancel(const Status& why) {
  if (!finished_) Fail(why);
}

void Load::Fail(const Status& status) {
  finished_ = true;
  result_.prefix.reset();
  if (prefix_request_ != 0) {
    prefixes_.Cancel(std::exchange(prefix_request_, 0));
  } else if (!prefix_done_ && !ready_) {
    // Never asked for: its lease goes back all the same.
    context_.claims.Release({request_.ticket.front, request_.ticket.incarnation},
                            request_.ticket.prefixes.front().lease);
  }
  if (!own_done_) own_->Cancel(status);
  context_.env.clock.CallAfter({}, [weak = weak_from_this(), status] {
    if (const auto self = weak.lock()) self->Report(Error(status));
  });
}

void Load::Report(Result<LoadResult> result) {
  reported_ = true;
  events_.finished(std::move(result));
  ReportDrained();
}

void Load::ReportDrained() {
  if (!reported_ || !own_drained_) return;
  context_.under_way.erase(shared_from_this());
  events_.drained();
}

}  // namespace kvrelay::agent
