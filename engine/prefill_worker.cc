#include "engine/prefill_worker.h"

#include <glog/logging.h>

#include <algorithm>
#include <utility>

#include "agent/decode_request.h"
#include "engine/fingerprint.h"
#include "proto/codec.h"

namespace kvrelay::engine {

PrefillWorker::PrefillWorker(Engine& engine, agent::EngineAgent& agent)
    : engine_(engine), agent_(agent) {
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
  Request request;
  request.kind = RequestKind::kPrefill;
  request.system_ids = std::move(prefill.system_ids);
  request.token_ids = std::move(prefill.token_ids);
  request.deadline = agent_.env().clock.Now() + Millis(prefill.timeout_ms);
  job->tokens = request.prompt_tokens();
  std::vector<uint32_t> prompt = request.system_ids;
  prompt.insert(prompt.end(), request.token_ids.begin(), request.token_ids.end());
  job->prompt_hash = PromptHash(engine_.fingerprint(), prompt);
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
  return Status::Ok();
}

void PrefillWorker::OnAdmitted(const JobPtr& job, Admission& admission) {
  if (job->over) return;
  job->ticket = {.owner = agent_.engine(),
                 .incarnation = agent_.incarnation(),
                 .front = agent_.endpoint(),
                 .model = engine_.fingerprint(),
                 .prompt = {},
                 .prefixes = {}};
  job->offers_left = admission.prefix_tokens > 0 ? 2 : 1;
  if (admission.prefix_tokens > 0) {
    Offer(job, {.blocks = std::move(admission.prefix_blocks),
                .first_token = 0,
                .tokens = admission.prefix_tokens,
                .hash = admission.prefix_hash,
                .prefix = true,
                .finished = admission.prefix_cached});
  }
  Offer(job, {.blocks = std::move(admission.blocks),
              .first_token = admission.prefix_tokens,
              .tokens = job->tokens - admission.prefix_tokens,
              .hash = job->prompt_hash,
              .prefix = false,
              .finished = false});
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

  engine::Begin begin;
  begin.prompt_progress = ProgressOf(job->ticket.prompt.lease);
  bool live = begin.prompt_progress != nullptr;
  if (!job->ticket.prefixes.empty()) {
    begin.prefix_progress = ProgressOf(job->ticket.prefixes.front().lease);
    live = live && begin.prefix_progress != nullptr;
  }
  if (!live) return Fail(job, {Code::kLeaseEnded, "the lease ended before the prefill began"});
  engine_.Begin(job->number, std::move(begin));
  proto::PrefillReply reply;
  reply.ticket = job->ticket;
  job->responder->Reply(proto::Encode(reply), true);
}

// Null when the lease is not live on some rank.
ProgressFn PrefillWorker::ProgressOf(const LeaseId& lease) const {
  std::vector<std::shared_ptr<agent::ProgressWriter>> writers;
  for (uint32_t rank = 0; rank < agent_.tp_size(); ++rank) {
    writers.push_back(agent_.Writer(rank, lease));
    if (!writers.back()) return nullptr;
  }
  return [writers = std::move(writers)](uint32_t rank, const Progress& progress) {
    writers[rank]->Publish(progress);
  };
}

void PrefillWorker::OnDone(const JobPtr& job, const Outcome& outcome) {
  if (job->over) return;
  if (!outcome.status.ok()) return Fail(job, outcome.status);
  for (const LeaseId& lease : job->leases) agent_.owner().MarkFinished(lease);
  proto::PrefillReply reply;
  reply.finished = true;
  reply.queue_ms = ToMillis(outcome.begun - outcome.submitted);
  reply.compute_ms = ToMillis(outcome.prompt_done - outcome.begun);
  reply.prefix_hit = outcome.prefix_hit;
  job->responder->Reply(proto::Encode(reply), false);
  LOG(INFO) << "request " << job->request_id << ": prefilled " << job->tokens << " tokens ("
            << outcome.prefix_tokens << " shared, " << (outcome.prefix_hit ? "here already" : "new")
            << "), queue " << reply.queue_ms << " ms, compute " << reply.compute_ms << " ms";
  Close(job, "ok");
}

void PrefillWorker::Fail(const JobPtr& job, const Status& status) {
  if (job->over) return;
  engine_.End(job->number, status);
  for (const LeaseId& lease : job->leases) agent_.owner().Withdraw(lease, "prefill_failed");
  job->responder->Fail(status);
  LOG(INFO) << "request " << job->request_id << ": " << job->tokens
            << " tokens not prefilled: " << status.ToString();
  Close(job, std::string(CodeName(status.code())));
}

void PrefillWorker::Close(const JobPtr& job, const std::string& outcome) {
  job->over = true;
  agent_.counters().Add("kvrelay_requests_total{role=\"prefill\",outcome=\"" + outcome + "\"}");
  jobs_.erase(job->number);
}

}  // namespace kvrelay::engine
