// A decode engine in a schedule: the real reader leader and ranks, and requests that check every
// word they were served.
#pragma once

#include <map>
#include <memory>
#include <string>
#include <vector>

#include "agent/claims.h"
#include "agent/fetch.h"
#include "agent/prefix_table.h"
#include "kvcache/prefix_store.h"
#include "tests/sim/sim_rank.h"

namespace kvrelay::sim {

// What became of a schedule's requests.
struct Outcomes {
  uint64_t served = 0;
  uint64_t prefix_hits = 0;
  uint64_t failed = 0;
  std::string last_failure;
  uint64_t cancelled = 0;
  uint64_t no_room = 0;
  uint64_t retried = 0;
  uint64_t loaded = 0;    // from tickets that another engine has, too
  std::string violation;  // the first invariant that broke; empty: none
};

class SimDecode {
 public:
  struct Options {
    EngineId engine;
    std::string prefix;
    uint32_t tp = 1;
    KvFormat format = KvFormat::kNhd;
    bool mapped = true;
    uint64_t max_asked_bytes = 0;  // as agent::ReaderRank's
    uint32_t blocks = kBlocks;
    uint32_t prefixes = 2;
    std::vector<std::string> prefills;
    Duration request_timeout = Millis(8000);
    Priority priority = Priority::kDecode;  // of its requests
  };
  SimDecode(Host& host, Options options, Outcomes& outcomes);
  ~SimDecode();

  // Cancelled after `cancel_after` unless it is over by then; once served it decodes for `hold`.
  void Request(const Prompt& prompt, Duration cancel_after, Duration hold);
  // A ticket that somebody else asked for. Bytes move from SetReady on.
  void Load(const Prompt& prompt, const proto::Ticket& ticket, Duration hold);
  void SetReady(const proto::Ticket& ticket);

  bool AtRest() const;
  // How many tries ended for one reason and were followed by another.
  uint64_t Retries(const std::string& reason) const;
  std::string State() const;

 private:
  struct Active {
    Prompt prompt;
    BlockTable blocks;
    PrefixRef prefix;
    std::weak_ptr<agent::Fetch> fetch;
    std::weak_ptr<agent::Load> load;
    LeaseId lease;  // of `load`
    uint64_t id = 0;
    TimePoint deadline;
    Duration hold{};
    bool over = false;
  };
  std::shared_ptr<Active> Admit(const Prompt& prompt);
  void OnFetched(const std::shared_ptr<Active>& active, const Result<agent::FetchResult>& result);
  void OnLoaded(const std::shared_ptr<Active>& active, const Result<agent::LoadResult>& result);
  void Fail(const std::shared_ptr<Active>& active, const Status& status);
  void Decode(const std::shared_ptr<Active>& active, PrefixRef prefix);
  void Leave(const std::shared_ptr<Active>& active);
  void Check(const Active& active, const char* when);

  Host& host_;
  const Options options_;
  Outcomes& outcomes_;
  std::shared_ptr<BlockPool> pool_ = BlockPool::Create(options_.blocks);
  SystemPrefixStore store_{options_.prefixes};
  std::vector<std::unique_ptr<SimRank>> ranks_;
  std::unique_ptr<agent::RankLinks> links_;
  std::unique_ptr<agent::Claims> claims_;
  std::unique_ptr<agent::ReaderContext> context_;
  std::unique_ptr<agent::PrefixTable> prefixes_;
  std::unique_ptr<agent::PrefillPool> prefills_;
  std::map<uint64_t, std::shared_ptr<Active>> active_;
  uint64_t next_ = 1;
};

}  // namespace kvrelay::sim
