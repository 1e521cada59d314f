#include "agent/prefix_table.h"

#include <algorithm>
#include <utility>

namespace kvrelay::agent {

PrefixTable::PrefixTable(ReaderContext& context, SystemPrefixStore& store, BlockPool& pool,
                         uint32_t block_size, std::function<bool()> make_room)
    : context_(context),
      store_(store),
      pool_(pool),
      block_size_(block_size),
      make_room_(std::move(make_room)) {}

PrefixTable::~PrefixTable() {
  for (auto& [id, waiting] : requests_) context_.env.clock.Cancel(waiting.timer);
}

PrefixTable::RequestId PrefixTable::Acquire(Request request,
                                            std::function<void(Result<PrefixGrant>)> done) {
  const RequestId id = next_id_++;
  Waiting& waiting = requests_[id];
  waiting.done = std::move(done);
  waiting.timer = context_.env.clock.CallAt(request.deadline, [this, id] {
    const auto it = requests_.find(id);
    if (it == requests_.end()) return;
    const auto expired = std::move(it->second.done);
    Cancel(id);
    expired(Error(Code::kDeadlineExceeded, "the shared prefix did not arrive within the deadline"));
  });
  waiting.request = std::move(request);
  context_.env.clock.CallAfter({}, [this, id] { Arrive(id); });
  return id;
}

void PrefixTable::Arrive(RequestId id) {
  const auto it = requests_.find(id);
  if (it == requests_.end()) return;
  const ContentHash hash = it->second.request.part.hash;
  if (PrefixRef prefix = store_.Find(hash)) {
    context_.env.counters.Add("kvrelay_prefix_hits_total");
    return Answer(id, PrefixGrant{.prefix = std::move(prefix), .pulled = false, .stats = {}}, true);
  }
  Entry& entry = entries_[hash];
  if (entry.pull) {
    entry.waiters.push_back(id);
  } else {
    StartPull(hash, entry, id);
  }
}

Result<BlockTable> PrefixTable::TakeBlocks(uint32_t tokens) {
  const uint32_t blocks = (tokens + block_size_ - 1) / block_size_;
  auto table = pool_.Allocate(blocks);
  while (!table.has_value() && table.error().code() == Code::kOverloaded &&
         ((make_room_ && make_room_()) || store_.EvictOne())) {
    table = pool_.Allocate(blocks);
  }
  return table;
}

void PrefixTable::StartPull(const ContentHash& hash, Entry& entry, RequestId id) {
  const Request& request = requests_.at(id).request;
  auto blocks = TakeBlocks(request.part.tokens);
  if (!blocks.has_value()) {
    Answer(id, Error(blocks.error().Wrap("no room for the shared prefix")), true);
    return HandOver(hash);
  }
  entry.puller = id;
  // The store's share and the pull's share: the pull's own stays until it is drained.
  auto kept = std::make_shared<BlockTable>(blocks->Share());
  entry.pull = std::make_shared<EnginePull>(
      context_,
      EnginePullRequest{.owner = request.owner,
                        .owner_engine = request.owner_engine,
                        .part = request.part,
                        .blocks = {std::move(*blocks), request.part.first_token},
                        .deadline = request.deadline},
      EnginePull::Events{.finished =
                             [this, hash, kept](const Result<PullStats>& stats) {
                               OnPulled(hash, std::move(*kept), stats);
                             },
                         .drained = [this, hash] { OnDrained(hash); }});
  entry.pull->Start();
  entry.pull->SetReady();
}

void PrefixTable::OnPulled(const ContentHash& hash, BlockTable blocks,
                           const Result<PullStats>& stats) {
  Entry& entry = entries_.at(hash);
  const RequestId puller = std::exchange(entry.puller, 0);
  if (!stats.has_value()) {
    // Who pulled falls back; the waiters go on waiting until the destination has drained.
    if (puller != 0) Answer(puller, tl::unexpected(stats.error()), false);
    return;
  }
  const uint32_t tokens = static_cast<uint32_t>(blocks.size()) * block_size_;
  const PrefixRef prefix =
      store_.Insert(hash, tokens, std::move(blocks), stats->scales, stats->cast);
  const auto waiters = std::exchange(entry.waiters, {});
  if (puller != 0) {
    Answer(puller, PrefixGrant{.prefix = prefix, .pulled = true, .stats = *stats}, false);
  }
  for (const RequestId id : waiters) {
    context_.env.counters.Add("kvrelay_prefix_hits_total");
    Answer(id, PrefixGrant{.prefix = prefix, .pulled = false, .stats = {}}, true);
  }
}

void PrefixTable::OnDrained(const ContentHash& hash) {
  // Called from inside the pull: it goes when its own frames are done.
  context_.env.clock.CallAfter({}, [pull = std::move(entries_.at(hash).pull)] {});
  HandOver(hash);
}

void PrefixTable::HandOver(const ContentHash& hash) {
  const auto it = entries_.find(hash);
  Entry& entry = it->second;
  entry.pull.reset();
  if (entry.waiters.empty()) {
    entries_.erase(it);
    return;
  }
  const RequestId next = entry.waiters.front();
  entry.waiters.pop_front();
  StartPull(hash, entry, next);
}

void PrefixTable::Cancel(RequestId id) {
  const auto it = requests_.find(id);
  if (it == requests_.end()) return;
  const Waiting waiting = std::move(it->second);
  requests_.erase(it);
  context_.env.clock.Cancel(waiting.timer);
  const auto found = entries_.find(waiting.request.part.hash);
  if (found != entries_.end() && found->second.puller == id) {
    found->second.puller = 0;
    found->second.pull->Cancel({Code::kCancelled, "the request was cancelled"});
    return;
  }
  if (found != entries_.end()) std::erase(found->second.waiters, id);
  context_.claims.Release(waiting.request.owner, waiting.request.part.lease);
}

void PrefixTable::Answer(RequestId id, Result<PrefixGrant> grant, bool release) {
  const auto it = requests_.find(id);
  if (it == requests_.end()) return;
  const Waiting waiting = std::move(it->second);
  requests_.erase(it);
  context_.env.clock.Cancel(waiting.timer);
  if (release) context_.claims.Release(waiting.request.owner, waiting.request.part.lease);
  waiting.done(std::move(grant));
}

}  // namespace kvrelay::agent
