// Everything that one ticket brings into this engine: the shared prefix (referenced, waited for, or
// pulled) and the request's own tokens.
#pragma once

#include <functional>
#include <memory>

#include "agent/engine_pull.h"
#include "agent/prefix_table.h"

namespace kvrelay::agent {

struct LoadRequest {
  proto::Ticket ticket;
  HeldTables blocks;  // for the ticket's own part; held until drained. Empty: SetDestination comes
                      // before SetReady
  uint32_t held_tokens = 0;  // of the own part: the KV of the positions before is here already
  // Of the ticket's own part: a prefix, which others may wait for, is always pulled as if users
  // did.
  Priority priority = Priority::kDecode;
  TimePoint deadline;
  std::vector<ContentHash> prefix_names{};  // of the ticket's prefix, as in SystemPrefix
};

struct LoadResult {
  PrefixRef prefix;           // null when the ticket names none
  bool prefix_hit = false;    // present, or brought by another request
  uint64_t prefix_bytes = 0;  // moved for it by this request
  PullStats own;              // of the request's own tokens
  bool cast = false;  // some of all that is not the numbers of the owner, but converted ones
};

// Control thread of the leader. From Start until drained its context keeps it.
class Load : public std::enable_shared_from_this<Load> {
 public:
  struct Events {
    std::function<void(Result<LoadResult>)> finished;  // exactly once, never inside a call of ours
    std::function<void()> drained;                     // exactly once, not before `finished`
  };

  Load(ReaderContext& context, PrefixTable& prefixes, LoadRequest request, Events events);

  void Start();  // claims, and keeps the claims from now on
  // Once, for a load that was started without blocks. They are the load's until drained, or go back
  // at once when it is over.
  void SetDestination(HeldTables blocks, uint32_t held_tokens);
  void SetReady();  // bytes may move
  void Cancel(const Status& why);

 private:
  void OnOwn(const Result<PullStats>& stats);
  void OnPrefix(const Result<PrefixGrant>& grant);
  void FinishIfComplete();
  void Fail(const Status& status);
  void Report(Result<LoadResult> result);
  void ReportDrained();

  ReaderContext& context_;
  PrefixTable& prefixes_;
  LoadRequest request_;
  Events events_;
  std::shared_ptr<EnginePull> own_;
  PrefixTable::RequestId prefix_request_ = 0;
  LoadResult result_;
  bool ready_ = false;
  bool own_done_ = false;
  bool own_drained_ = false;
  bool prefix_done_ = false;
  bool finished_ = false;  // decided; the report may still be on its way
  bool reported_ = false;
};

}  // namespace kvrelay::agent
