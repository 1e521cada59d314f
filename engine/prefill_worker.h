// The prefill daemon's requests: computes prompts for decode engines and offers their KV under
// leases.
//
// accepted (queued in the engine) -> admitted (blocks) -> offered (leases live on all ranks; the
// ticket leaves) -> what the decode engine has of an earlier turn is taken from there -> the rest
// is computed, progress published chunk by chunk -> finished (the decode engine pulls).
#pragma once

#include <memory>
#include <span>
#include <string>
#include <unordered_map>
#include <vector>

#include "agent/engine_agent.h"
#include "engine/engine.h"

namespace kvrelay::engine {

struct PrefillOptions {
  // Dials the decode engine that a request names, and takes from it the KV that it still has of the
  // conversation.
  bool reuse_from_decode = false;
  Duration pull_timeout = Millis(30'000);  // for that; then all is computed
};

// Control thread of `agent`'s leader, except where said. Handles kPrefill. Both references outlive
// it; it outlives the threads of both.
class PrefillWorker {
 public:
  PrefillWorker(Engine& engine, agent::EngineAgent& agent, PrefillOptions options = {});

  // From now on requests are refused with kDraining.
  void Drain();
  bool draining() const { return draining_; }
  // No request is in work and no lease lives.
  bool Idle() const { return jobs_.empty() && agent_.owner().live_leases() == 0; }
  // Ends what is left; how many requests and leases that were.
  size_t EndAll();
  size_t requests() const { return jobs_.size(); }

 private:
  // The prompt's first tokens, whose KV a decode engine still has.
  struct Taking {
    std::weak_ptr<agent::Load> load;
    bool over = true;     // nothing writes the job's blocks, or will
    uint32_t tokens = 0;  // offered, from the first on
    uint32_t first = 0;   // that is taken: the ones before are a shared prefix
    Clock::TimerId timer = 0;
    TimePoint began;     // to move
    double ms = 0;       // from then on, also when it failed
    uint32_t until = 0;  // of positions before it the KV is here
    uint32_t moved = 0;  // tokens
    uint64_t bytes = 0;
  };
  struct Job {
    std::string request_id;
    agent::ResponderPtr responder;
    RequestNumber number = 0;
    uint32_t tokens = 0;
    ContentHash prompt_hash;
    // Of the reader's cut, which need not be where this engine's own shared prefix ends.
    uint32_t prefix_tokens = 0;
    ContentHash prefix_hash;
    std::vector<LeaseId> leases;
    proto::Ticket ticket;
    int offers_left = 0;
    ProgressFn progress;  // from the last offer to Begin
    Taking taking;
    bool over = false;
  };
  using JobPtr = std::shared_ptr<Job>;

  void OnPrefill(std::string_view body, const agent::ResponderPtr& responder);
  Status Submit(const JobPtr& job, proto::Prefill prefill);
  void OnAdmitted(const JobPtr& job, const Admission& admission);
  void Offer(const JobPtr& job, agent::OfferRequest request);
  void OnOffered(const JobPtr& job, proto::TicketPart part, bool prefix,
                 const Result<LeaseId>& lease);
  void BeginIfReady(const JobPtr& job);
  ProgressFn ProgressOf(const std::vector<LeaseId>& leases) const;
  void OnDone(const JobPtr& job, const Outcome& outcome);
  void Fail(const JobPtr& job, const Status& status);
  void Close(const JobPtr& job, const std::string& outcome);
  // take_kept.cc
  Status CheckReuse(const proto::Reuse& reuse, std::span<const uint32_t> prompt) const;
  uint32_t ReusableTokens(const Job& job, const std::vector<proto::Reuse>& offered,
                          std::span<const uint32_t> prompt);
  void ClaimKept(const JobPtr& job, const proto::Reuse& reuse, TimePoint deadline);
  void TakeKept(const JobPtr& job, const BlockTable& blocks, uint32_t first_token);
  static Status CheckTaken(const Result<agent::LoadResult>& result);
  void OnTaken(const JobPtr& job, const Result<agent::LoadResult>& result);
  void OnTakingOver(const JobPtr& job);

  Engine& engine_;
  agent::EngineAgent& agent_;
  const PrefillOptions options_;
  bool draining_ = false;
  std::unordered_map<RequestNumber, JobPtr> jobs_;
};

}  // namespace kvrelay::engine
