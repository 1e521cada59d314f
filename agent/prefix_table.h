// Shared prefixes on the reader engine: each is pulled once, whoever asks first; everybody else
// waits for that pull.
//
// An entry exists while a prefix is on its way: kPulling (by one request), then present in the
// store, or kDraining (the pull failed or was cancelled, and ranks may still write its
// destination). When the destination has drained the next waiter's ticket takes over. References
// for all waiters are taken in the step that makes the prefix present.
//
// Of prefixes that begin alike the common blocks are pulled once: what is here already is shared,
// not pulled, and a pull of which more is on its way than here claims its lease, but moves nothing
// before that has ended.
#pragma once

#include <cstdint>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <unordered_map>
#include <vector>

#include "agent/engine_pull.h"
#include "kvcache/prefix_store.h"

namespace kvrelay::agent {

struct PrefixGrant {
  PrefixRef prefix;
  bool pulled =
      false;        // by this very request; else it was there, or came with somebody else's pull
  PullStats stats;  // of that pull
};

// Control thread of the leader.
class PrefixTable {
 public:
  using RequestId = uint64_t;
  struct Request {
    OwnerKey owner;
    EngineId owner_engine;
    proto::TicketPart part;          // its own lease on the prefix
    std::vector<ContentHash> names;  // as in SystemPrefix
    TimePoint deadline;
  };

  // `store` and `pool`, of blocks of `block_size` tokens, outlive it. `make_room`: as in
  // EngineAgentOptions.
  PrefixTable(ReaderContext& context, SystemPrefixStore& store, BlockPool& pool,
              uint32_t block_size, std::function<bool()> make_room = nullptr);
  ~PrefixTable();

  // `done` exactly once, never inside the call, unless cancelled before. The request's lease is
  // released by the table in every case: by its pull, or because it was not needed.
  RequestId Acquire(Request request, std::function<void(Result<PrefixGrant>)> done);
  // `done` does not run any more. If it was the one that pulls, the next waiter takes over.
  void Cancel(RequestId id);

  size_t waiting() const { return requests_.size(); }

 private:
  struct Waiting {
    Request request;
    std::function<void(Result<PrefixGrant>)> done;
    Clock::TimerId timer = 0;
  };
  struct Entry {
    RequestId puller = 0;  // 0 while draining, or when the puller was cancelled
    std::shared_ptr<EnginePull> pull;
    SystemPrefix prefix;  // what it makes; has blocks since the pull has a destination
    ContentHash behind;   // the entry that brings its start first; zero: none
    std::deque<RequestId> waiters;
  };

  void Arrive(RequestId id);
  void StartPull(RequestId id);
  ContentHash UnderWay(const Request& request) const;
  void Move(const ContentHash& hash);
  void Grant(Entry& entry, const PrefixRef& prefix, const PullStats* pulled);
  Result<BlockTable> TakeBlocks(uint32_t tokens);
  void OnPulled(const ContentHash& hash, const Result<PullStats>& stats);
  void OnDrained(const ContentHash& hash);
  void HandOver(const ContentHash& hash);
  void Answer(RequestId id, Result<PrefixGrant> grant, bool release);

  ReaderContext& context_;
  SystemPrefixStore& store_;
  BlockPool& pool_;
  const uint32_t block_size_;
  const std::function<bool()> make_room_;
  RequestId next_id_ = 1;
  std::unordered_map<RequestId, Waiting> requests_;
  std::unordered_map<ContentHash, Entry> entries_;
};

}  // namespace kvrelay::agent
