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
  const Request& request = it->second.request;
  const ContentHash hash = request.part.hash;
  PrefixRef prefix =
      request.names.empty() ? store_.Find(hash) : store_.Find(request.names, request.part.tokens);
  if (prefix) {
    context_.env.counters.Add("kvrelay_prefix_hits_total");
    return Answer(id, PrefixGrant{.prefix = std::move(prefix), .pulled = false, .stats = {}}, true);
  }
  const auto under_way = entries_.find(hash);
  if (under_way == entries_.end()) return StartPull(id);
  under_way->second.waiters.push_back(id);
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

void PrefixTable::StartPull(RequestId id) {
  const Request& request = requests_.at(id).request;
  const ContentHash hash = request.part.hash;
  const ContentHash behind = UnderWay(request);
  Entry& entry = entries_[hash];
  entry.puller = id;
  entry.behind = behind;
  entry.prefix.hash = hash;
  entry.prefix.tokens = request.part.tokens;
  entry.prefix.names = request.names;
  entry.pull = std::make_shared<EnginePull>(
      context_,
      EnginePullRequest{.owner = request.owner,
                        .owner_engine = request.owner_engine,
                        .part = request.part,
                        .blocks = {},
                        .deadline = request.deadline},
      EnginePull::Events{
          .finished = [this, hash](const Result<PullStats>& stats) { OnPulled(hash, stats); },
          .drained = [this, hash] { OnDrained(hash); }});
  entry.pull->Start();
  if (behind == ContentHash{}) Move(hash);
}

// The entry that brings most of this prefix's start, if that is more than is here.
ContentHash PrefixTable::UnderWay(const Request& request) const {
  ContentHash best;
  size_t most = store_.FindStart(request.names).blocks.size();
  for (const auto& [hash, entry] : entries_) {
    const uint32_t common = CommonBlocks(entry.prefix.names, request.names);
    if (entry.puller == 0 || common <= most) continue;
    most = common;
    best = hash;
  }
  return best;
}

// A pull gets its destination: the blocks behind what is here by now.
void PrefixTable::Move(const ContentHash& hash) {
  Entry& entry = entries_.at(hash);
  entry.behind = {};
  if (entry.puller == 0) return;
  SystemPrefix& prefix = entry.prefix;
  if (const PrefixRef present = store_.Find(prefix.names, prefix.tokens)) {
    Grant(entry, present, nullptr);
    return entry.pull->Cancel({Code::kCancelled, "the prefix came with a longer one"});
  }
  SystemPrefixStore::Start start = store_.FindStart(prefix.names);
  const uint32_t held = static_cast<uint32_t>(start.blocks.size()) * block_size_;
  auto blocks = TakeBlocks(prefix.tokens - held);
  if (!blocks.has_value()) {
    return entry.pull->Cancel(blocks.error().Wrap("no room for the shared prefix"));
  }
  // The store's share and the pull's share: the pull's own stays until it is drained.
  prefix.blocks = std::move(start.blocks);
  prefix.cast = start.cast;
  prefix.blocks.Append(blocks->Share());
  prefix.tokens = static_cast<uint32_t>(prefix.blocks.size()) * block_size_;
  entry.pull->SetDestination({std::move(*blocks), held}, held);
  entry.pull->SetReady();
}

void PrefixTable::OnPulled(const ContentHash& hash, const Result<PullStats>& stats) {
  Entry& entry = entries_.at(hash);
  if (!stats.has_value()) {
    // Who pulled falls back; the waiters go on waiting until the destination has drained.
    const RequestId puller = std::exchange(entry.puller, 0);
    if (puller != 0) Answer(puller, tl::unexpected(stats.error()), false);
    entry.prefix.blocks.Reset();
    return;
  }
  entry.prefix.scales = stats->scales;
  entry.prefix.cast = entry.prefix.cast || stats->cast;
  Grant(entry, store_.Insert(std::move(entry.prefix)), &*stats);
}

// To all at once, in the step that makes it present. `pulled`: by the entry's own pull.
void PrefixTable::Grant(Entry& entry, const PrefixRef& prefix, const PullStats* pulled) {
  const RequestId puller = std::exchange(entry.puller, 0);
  const auto waiters = std::exchange(entry.waiters, {});
  const auto hit = [&](RequestId id, bool release) {
    context_.env.counters.Add("kvrelay_prefix_hits_total");
    Answer(id, PrefixGrant{.prefix = prefix, .pulled = false, .stats = {}}, release);
  };
  if (puller != 0 && pulled != nullptr) {
    Answer(puller, PrefixGrant{.prefix = prefix, .pulled = true, .stats = *pulled}, false);
  } else if (puller != 0) {
    hit(puller, false);
  }
  for (const RequestId id : waiters) hit(id, true);
}

void PrefixTable::OnDrained(const ContentHash& hash) {
  // Called from inside the pull: it goes when its own frames are done.
  auto ended = entries_.extract(hash);
  context_.env.clock.CallAfter({}, [pull = std::move(ended.mapped().pull)] {});
  // The first of those that wait for this prefix pulls it now, the others go on waiting.
  for (const RequestId id : ended.mapped().waiters) Arrive(id);
  std::vector<ContentHash> behind;
  for (const auto& [name, entry] : entries_) {
    if (entry.behind == hash) behind.push_back(name);
  }
  for (const ContentHash& name : behind) {
    // What one moves may end another.
    const auto it = entries_.find(name);
    if (it != entries_.end() && it->second.behind == hash) Move(name);
  }
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
