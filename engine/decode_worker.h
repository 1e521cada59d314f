// The decode daemon's requests: admits a client's prompt against its own blocks, has its KV fetched
// from a prefill worker, and streams the answer. Of a conversation's earlier turn it fetches only
// what the engine has not kept, and offers the worker what it has.
#pragma once

#include <map>
#include <memory>
#include <string>
#include <unordered_map>
#include <vector>

#include "agent/engine_agent.h"
#include "engine/engine.h"
#include "engine/summary.h"

namespace kvrelay::engine {

// Control thread of `agent`'s leader, except where said. Handles kGenerate and kCancel. Both
// references outlive it; it outlives the threads of both.
class DecodeWorker {
 public:
  DecodeWorker(Engine& engine, agent::EngineAgent& agent);

  // From now on requests are refused with kDraining.
  void Drain();
  bool draining() const { return draining_; }
  // No request is in work and every lease was given back.
  bool Idle() const { return requests_.empty() && agent_.owner().live_leases() == 0; }
  // Ends what is left; how many requests that were.
  size_t EndAll();
  size_t requests() const { return requests_.size(); }

 private:
  struct Active {
    std::string request_id;
    agent::ResponderPtr responder;
    RequestNumber number = 0;
    std::vector<uint32_t> system_ids;
    std::vector<uint32_t> token_ids;
    Priority priority = Priority::kDecode;
    TimePoint deadline;
    TextStream text;
    std::weak_ptr<agent::Fetch> fetch;
    LeaseId kept;  // on the KV of an earlier turn, for the prefill worker; zero: none is live
    double compute_ms = 0;  // of this conversation's prompts, for its next turn
    uint64_t computed_tokens = 0;
    TransferSummary transfer;
    uint64_t generated = 0;
    bool over = false;

    explicit Active(const Tokenizer& tokenizer) : text(tokenizer) {}
    std::vector<uint32_t> Prompt() const;
  };
  using ActivePtr = std::shared_ptr<Active>;

  void OnGenerate(std::string_view body, const agent::ResponderPtr& responder);
  void OnCancelRequest(std::string_view body, const agent::ResponderPtr& responder);
  Status Submit(const ActivePtr& active, proto::Generate generate);
  void OnAdmitted(const ActivePtr& active, const std::shared_ptr<Admission>& admission);
  void StartFetch(const ActivePtr& active, const std::shared_ptr<Admission>& admission,
                  std::vector<proto::Reuse> reuse);
  void OnFetched(const ActivePtr& active, const Result<agent::FetchResult>& result);
  void OnTokens(const ActivePtr& active, const std::vector<uint32_t>& ids);
  void OnDone(const ActivePtr& active, const Outcome& outcome);
  void End(const ActivePtr& active, const Status& status);
  static double SavedMs(const Active& active, const agent::FetchResult& result);
  void CountTransfer(const TransferSummary& transfer);
  // offer_kept.cc
  void OfferKept(const ActivePtr& active, const std::shared_ptr<Admission>& admission);
  proto::Reuse PublishKept(const ActivePtr& active, const proto::TicketPart& part) const;
  void WithdrawKept(const ActivePtr& active);

  Engine& engine_;
  agent::EngineAgent& agent_;
  bool draining_ = false;
  std::unordered_map<RequestNumber, ActivePtr> requests_;
};

}  // namespace kvrelay::engine
