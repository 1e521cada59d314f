#include "engine/prefill_worker.h"

#include <glog/logging.h>

#include <algorithm>
#include <utility>

#include "agent/decode_request.h"
#include "engine/fingerprint.h"
#include "proto/codec.h"

namespace kvrelay::engine {

PrefillWorker::PrefillWorker(Engine& engine, agent::EngineAgent& agent, PrefillOptions options)
    : engine_(engine), agent_(agent), options_(options) {
  agent_.rpc().Handle(proto::Type::kPrefill,
                      [this](std::string_view body, const agent::ResponderPtr& responder) {
                        OnPrefill(body, responder);
                      });
}

void PrefillWorker::Drain() {
  draining_ = true;
  agent_.SetDraining();
}

size_t PrefillWorker::EndAll() {
  const std::unordered_map<RequestNumber, JobPtr> jobs = jobs_;
  for (const auto& [number, job] : jobs) {
    Fail(job, {Code::kDraining, "the prefill worker shut down before the prompt was computed"});
  }
  return jobs.size() + agent_.owner().WithdrawAll("shutdown");
}

void PrefillWorker::OnPrefill(std::string_view body, const agent::ResponderPtr& responder) {
  auto prefill = agent::DecodeRequest<proto::Prefill>(agent_.env(), body);
  if (!prefill.has_value()) return responder->Fail(prefill.error());
  auto job = std::make_shared<Job>();
  job->request_id = prefill->request_id;
  job->responder = responder;
  if (Status status = Submit(job, std::move(*prefill)); !status.ok()) {
    job->over = true;
    agent_.counters().Add("kvrelay_requests_total{role=\"prefill\",outcome=\"" +
                          std::string(CodeName(status.code())) + "\"}");
    return responder->Fail(status);
  }
  jobs_[job->number] = job;
  responder->OnCancel([this, job] { Fail(job, {Code::kCancelled, "the decode engine left"}); });
  proto::PrefillReply accepted;
  accepted.accepted = true;
  responder->Reply(proto::Encode(accepted), true);
}

Status PrefillWorker::Submit(const JobPtr& job, proto::Prefill prefill) {
  if (draining_) return {Code::kDraining, "prefill " + agent_.endpoint() + " is shutting down"};
  if (prefill.model != engine_.fingerprint()) {
    return {Code::kIncompatible, "the request is for model " + prefill.model.ToHex() +
                                     ", prefill " + agent_.endpoint() + " has " +
                                     engine_.fingerprint().ToHex()};
  }
  const uint64_t prompt_tokens = prefill.system_ids.size() + prefill.token_ids.size();
  if (prefill.prefix_tokens > prefill.system_ids.size() ||
      (prefill.prefix_tokens > 0 && prefill.prefix_tokens == prompt_tokens)) {
    return {Code::kInvalidArgument,
            "PREFILL: a prefix of " + std::to_string(prefill.prefix_tokens) + " tokens of " +
                std::to_string(prefill.system_ids.size()) + " system tokens and " +
                std::to_string(prefill.token_ids.size()) + " others"};
  }
  Request request;
  request.kind = RequestKind::kPrefill;
  request.system_ids = std::move(prefill.system_ids);
  request.token_ids = std::move(prefill.token_ids);
  request.deadline = agent_.env().clock.Now() + Millis(prefill.timeout_ms);
  job->tokens = request.prompt_tokens();
  std::vector<uint32_t> prompt = request.system_ids;
  prompt.insert(prompt.end(), request.token_ids.begin(), request.token_ids.end());
  job->prompt_hash = PromptHash(engine_.fingerprint(), prompt);
  job->prefix_tokens = prefill.prefix_tokens;
  job->prefix_hash = PrefixHash(engine_.fingerprint(), std::span(prompt).first(job->prefix_tokens));
  request.reuse_tokens = ReusableTokens(*job, prefill.reuse, prompt);
  const TimePoint deadline = request.deadline;
  const bool reuses = request.reuse_tokens > 0;
  // From the engine's thread to ours, in order.
  request.on_admitted = [this, job](RequestNumber, Admission admission) {
    agent_.Post([this, job, held = std::make_shared<Admission>(std::move(admission))] {
      OnAdmitted(job, *held);
    });
  };
  request.on_done = [this, job](RequestNumber, const Outcome& outcome) {
    agent_.Post([this, job, outcome] { OnDone(job, outcome); });
  };
  auto number = engine_.Submit(std::move(request));
  if (!number.has_value()) return number.error();
  job->number = *number;
  if (reuses) ClaimKept(job, prefill.reuse.front(), deadline);
  return Status::Ok();
}

// The reader cuts the prompt where its own blocks end. Where ours end is our business: both leases
// may hold the block with the cut, and blocks of our own prefix and of the request.
void PrefillWorker::OnAdmitted(const JobPtr& job, const Admission& admission) {
  if (job->over) return;
  job->ticket = {.owner = agent_.engine(),
                 .incarnation = agent_.incarnation(),
                 .front = agent_.endpoint(),
                 .model = engine_.fingerprint(),
                 .prompt = {},
                 .prefixes = {}};
  BlockTable all = admission.prefix_blocks.Share();
  all.Append(admission.blocks.Share());
  const uint32_t block_size = engine_.runner().block_size();
  job->offers_left = job->prefix_tokens > 0 ? 2 : 1;
  if (job->prefix_tokens > 0) {
    const uint32_t blocks = (job->prefix_tokens + block_size - 1) / block_size;
    Offer(job,
          {.blocks = {all.Share(0, blocks), 0},
           .first_token = 0,
           .tokens = job->prefix_tokens,
           .hash = job->prefix_hash,
           .prefix = true,
           .finished = admission.prefix_cached && job->prefix_tokens <= admission.prefix_tokens,
           .scales = {}});
  }
  const uint32_t first_block = job->prefix_tokens / block_size;
  Offer(job,
        {.blocks = {all.Share(first_block, all.size() - first_block), first_block * block_size},
         .first_token = job->prefix_tokens,
         .tokens = job->tokens - job->prefix_tokens,
         .hash = job->prompt_hash,
         .prefix = false,
         .finished = false,
         .scales = {}});
  TakeKept(job, all, admission.prefix_tokens);
}

void PrefillWorker::Offer(const JobPtr& job, agent::OfferRequest request) {
  const proto::TicketPart part{.lease = {},
                               .hash = request.hash,
                               .first_token = request.first_token,
                               .tokens = request.tokens};
  const bool prefix = request.prefix;
  agent_.owner().Offer(std::move(request), [this, job, part, prefix](const Result<LeaseId>& lease) {
    OnOffered(job, part, prefix, lease);
  });
}

void PrefillWorker::OnOffered(const JobPtr& job, proto::TicketPart part, bool prefix,
                              const Result<LeaseId>& lease) {
  --job->offers_left;
  if (lease.has_value() && job->over) agent_.owner().Withdraw(*lease, "prefill_failed");
  if (job->over) return;
  if (!lease.has_value()) return Fail(job, lease.error());
  part.lease = *lease;
  job->leases.push_back(*lease);
  (prefix ? job->ticket.prefixes.emplace_back() : job->ticket.prompt) = part;
  if (job->offers_left > 0) return;

  // Before the ticket leaves: a reader that has the prefix gives its lease back at once.
  job->progress = ProgressOf(job->leases);
  if (!job->progress) {
    return Fail(job, {Code::kLeaseEnded, "the lease ended before the prefill began"});
  }
  proto::PrefillReply reply;
  reply.ticket = job->ticket;
  job->responder->Reply(proto::Encode(reply), true);
  BeginIfReady(job);
}

void PrefillWorker::BeginIfReady(const JobPtr& job) {
  if (!job->progress || !job->taking.over) return;
  engine::Begin begin;
  begin.reused_tokens = job->taking.until;
  begin.progress = std::exchange(job->progress, nullptr);
  engine_.Begin(job->number, std::move(begin));
}

// Positions count for every lease, whatever part of the prompt it is on. Null when one is not live
// on some rank.
ProgressFn PrefillWorker::ProgressOf(const std::vector<LeaseId>& leases) const {
  std::vector<std::vector<std::shared_ptr<agent::ProgressWriter>>> writers(agent_.num_ranks());
  for (uint32_t rank = 0; rank < agent_.num_ranks(); ++rank) {
    for (const LeaseId& lease : leases) {
      writers[rank].push_back(agent_.Writer(rank, lease));
      if (!writers[rank].back()) return nullptr;
    }
  }
  return [writers = std::move(writers)](uint32_t rank, const Progress& progress) {
    for (const auto& writer : writers[rank]) writer->Publish(progress);
  };
}

void PrefillWorker::OnDone(const JobPtr& job, const Outcome& outcome) {
  if (job->over) return;
  if (!outcome.status.ok()) return Fail(job, outcome.status);
  for (const LeaseId& lease : job->leases) agent_.owner().MarkFinished(lease);
  proto::PrefillReply reply;
  reply.finished = true;
  const Taking& taking = job->taking;
  reply.queue_ms = ToMillis(outcome.begun - outcome.submitted) - taking.ms;
  reply.compute_ms = ToMillis(outcome.prompt_done - outcome.begun);
  reply.prefix_hit = outcome.prefix_hit;
  reply.computed_tokens = outcome.computed_tokens;
  reply.reused_tokens = taking.moved;
  reply.reuse_bytes = taking.bytes;
  reply.reuse_ms = taking.ms;
  job->responder->Reply(proto::Encode(reply), false);
  LOG(INFO) << "request " << job->request_id << ": prefilled " << job->tokens << " tokens ("
            << outcome.prefix_tokens << " shared, " << (outcome.prefix_hit ? "here already" : "new")
            << "), " << taking.moved << " tokens (" << taking.bytes << " bytes) reused in "
            << taking.ms << " ms, queue " << reply.queue_ms << " ms, compute " << reply.compute_ms
            << " ms";
  Close(job, "ok");
}

void PrefillWorker::Fail(const JobPtr& job, const Status& status) {
  if (job->over) return;
  engine_.End(job->number, status);
  if (const auto load = job->taking.load.lock()) load->Cancel(status);
  for (const LeaseId& lease : job->leases) agent_.owner().Withdraw(lease, "prefill_failed");
  job->responder->Fail(status);
  LOG(INFO) << "request " << job->request_id << ": " << job->tokens
            << " tokens not prefilled: " << status.ToString();
  Close(job, std::string(CodeName(status.code())));
}

void PrefillWorker::Close(const JobPtr& job, const std::string& outcome) {
  job->over = true;
  job->progress = nullptr;  // its writers hold the leases' records
  agent_.counters().Add("kvrelay_requests_total{role=\"prefill\",outcome=\"" + outcome + "\"}");
  jobs_.erase(job->number);
}

}  // namespace kvrelay::engine
