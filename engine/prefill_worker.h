// The prefill daemon's requests: computes prompts for decode engines and offers their KV under
// leases.
//
// accepted (queued in the engine) -> admitted (blocks) -> offered (leases live on all ranks; the
// ticket leaves) -> computed, progress published chunk by chunk -> finished (the decode engine
// pulls).
#pragma once

#include <memory>
#include <string>
#include <unordered_map>
#include <vector>

#include "agent/engine_agent.h"
#include "engine/engine.h"

namespace kvrelay::engine {

// Control thread of `agent`'s leader, except where said. Handles kPrefill. Both references outlive
// it; it outlives the threads of both.
class PrefillWorker {
 public:
  PrefillWorker(Engine& engine, agent::EngineAgent& agent);

  // From now on requests are refused with kDraining.
  void Drain();
  bool draining() const { return draining_; }
  // No request is in work and no lease lives.
  bool Idle() const { return jobs_.empty() && agent_.owner().live_leases() == 0; }
  // Ends what is left; how many requests and leases that were.
  size_t EndAll();
  size_t requests() const { return jobs_.size(); }

 private:
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
    bool over = false;
  };
  using JobPtr = std::shared_ptr<Job>;

  void OnPrefill(std::string_view body, const agent::ResponderPtr& responder);
  Status Submit(const JobPtr& job, proto::Prefill prefill);
  void OnAdmitted(const JobPtr& job, const Admission& admission);
  void Offer(const JobPtr& job, agent::OfferRequest request);
  void OnOffered(const JobPtr& job, proto::TicketPart part, bool prefix,
                 const Result<LeaseId>& lease);
  ProgressFn ProgressOf(const std::vector<LeaseId>& leases) const;
  void OnDone(const JobPtr& job, const Outcome& outcome);
  void Fail(const JobPtr& job, const Status& status);
  void Close(const JobPtr& job, const std::string& outcome);

  Engine& engine_;
  agent::EngineAgent& agent_;
  bool draining_ = false;
  std::unordered_map<RequestNumber, JobPtr> jobs_;
};

}  // namespace kvrelay::engine
