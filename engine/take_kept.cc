// The KV that a decode engine still has of a prompt's first tokens is taken from there instead of
// computed. Whatever goes wrong with that, the prompt is computed as if nothing had been offered.
#include <glog/logging.h>

#include <utility>

#include "engine/fingerprint.h"
#include "engine/prefill_worker.h"

namespace kvrelay::engine {

Status PrefillWorker::CheckReuse(const proto::Reuse& reuse,
                                 std::span<const uint32_t> prompt) const {
  if (!options_.reuse_from_decode) return {Code::kRefused, "--reuse_from_decode is off here"};
  // Values of another type would be rounded once more, or were already: the answer would be another
  // one than without the offer.
  const DType own = engine_.runner().ranks().front().layout.dtype;
  if (reuse.dtype != own) {
    return {Code::kIncompatible, "it is " + std::string(DTypeName(reuse.dtype)) +
                                     ", this cache is " + std::string(DTypeName(own))};
  }
  const proto::TicketPart& part = reuse.ticket.prompt;
  if (part.first_token != 0 || part.tokens == 0 || part.tokens >= prompt.size() ||
      !reuse.ticket.prefixes.empty()) {
    return {Code::kRefused, "it is of tokens [" + std::to_string(part.first_token) + ", +" +
                                std::to_string(part.tokens) + ") of a prompt of " +
                                std::to_string(prompt.size())};
  }
  if (reuse.ticket.model != engine_.fingerprint() ||
      part.hash != PromptHash(engine_.fingerprint(), prompt.first(part.tokens))) {
    return {Code::kRefused, "it is of another model or of other tokens"};
  }
  return Status::Ok();
}

uint32_t PrefillWorker::ReusableTokens(const Job& job, const std::vector<proto::Reuse>& offered,
                                       std::span<const uint32_t> prompt) {
  if (offered.empty()) return 0;
  const Status status = CheckReuse(offered.front(), prompt);
  if (status.ok()) return offered.front().ticket.prompt.tokens;
  agent_.counters().Add("kvrelay_reuse_total{outcome=\"" + std::string(CodeName(status.code())) +
                        "\"}");
  LOG(INFO) << "request " << job.request_id << ": KV offered by " << offered.front().ticket.front
            << " is not taken: " << status.ToString();
  return 0;
}

// At once: the claim keeps the lease while the request waits for its blocks.
void PrefillWorker::ClaimKept(const JobPtr& job, const proto::Reuse& reuse, TimePoint deadline) {
  job->taking.over = false;
  job->taking.tokens = reuse.ticket.prompt.tokens;
  const std::weak_ptr<Job> weak = job;
  job->taking.load = agent_.StartLoad(
      {.ticket = reuse.ticket, .blocks = {}, .priority = reuse.priority, .deadline = deadline},
      {.finished =
           [this, weak](const Result<agent::LoadResult>& result) {
             if (const JobPtr job = weak.lock()) OnTaken(job, result);
           },
       .drained =
           [this, weak] {
             if (const JobPtr job = weak.lock()) OnTakingOver(job);
           }});
}

void PrefillWorker::TakeKept(const JobPtr& job, const BlockTable& blocks, uint32_t first_token) {
  Taking& taking = job->taking;
  const auto load = taking.load.lock();
  if (taking.over || !load) return;
  if (first_token >= taking.tokens) {
    return load->Cancel({Code::kCancelled, "the shared prefix is all that was offered"});
  }
  const uint32_t block_size = engine_.runner().block_size();
  const uint32_t first_block = first_token / block_size;
  const uint32_t end_block = (taking.tokens + block_size - 1) / block_size;
  taking.first = first_token;
  taking.began = agent_.env().clock.Now();
  taking.timer = agent_.env().clock.CallAfter(options_.pull_timeout, [weak = taking.load] {
    if (const auto load = weak.lock()) load->Cancel({Code::kDeadlineExceeded, "it took too long"});
  });
  load->SetDestination({blocks.Share(first_block, end_block - first_block), first_token},
                       first_token);
  load->SetReady();
}

// Scales that differ show only when the numbers have come.
Status PrefillWorker::CheckTaken(const Result<agent::LoadResult>& result) {
  if (!result.has_value()) return result.error();
  if (!result->cast) return Status::Ok();
  return {Code::kIncompatible, "its numbers have other scales than this cache's"};
}

void PrefillWorker::OnTaken(const JobPtr& job, const Result<agent::LoadResult>& result) {
  Taking& taking = job->taking;
  const Status status = CheckTaken(result);
  agent_.counters().Add("kvrelay_reuse_total{outcome=\"" +
                        std::string(status.ok() ? "ok" : CodeName(status.code())) + "\"}");
  if (!status.ok()) {
    LOG(INFO) << "request " << job->request_id
              << ": nothing is reused, all is computed: " << status.ToString();
    return;
  }
  taking.until = taking.tokens;
  taking.moved = taking.tokens - taking.first;
  taking.bytes = result->own.bytes;
}

void PrefillWorker::OnTakingOver(const JobPtr& job) {
  Taking& taking = job->taking;
  Clock& clock = agent_.env().clock;
  clock.Cancel(std::exchange(taking.timer, 0));
  if (taking.began != TimePoint()) taking.ms = ToMillis(clock.Now() - taking.began);
  taking.over = true;
  if (!job->over) BeginIfReady(job);
}

}  // namespace kvrelay::engine
