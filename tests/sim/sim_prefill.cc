#include "tests/sim/sim_prefill.h"

#include <algorithm>
#include <utility>

#include "proto/codec.h"

namespace kvrelay::sim {
namespace {

Progress Tokens(uint32_t tokens) { return {.tokens = tokens, .chunk_end = tokens, .layers = 0}; }

}  // namespace

SimPrefill::SimPrefill(Host& host, Options options, std::unique_ptr<SimRank> rank1)
    : host_(host), options_(std::move(options)) {
  std::vector<std::string> endpoints;
  std::vector<KvShard> shards;
  std::vector<KvLayout> layouts;
  for (uint32_t rank = 0; rank < options_.tp; ++rank) {
    ranks_.push_back(rank == 1 && rank1 ? std::move(rank1) : NewRank(rank));
    endpoints.push_back(ranks_.back()->endpoint());
    shards.push_back(ranks_.back()->memory().shard());
    layouts.push_back(ranks_.back()->memory().layout());
  }
  agent::Env& env = ranks_.front()->env();
  links_ = std::make_unique<agent::RankLinks>(env, host.world.random.Next() | 1, endpoints);
  owner_ = std::make_unique<agent::OwnerLeader>(env, *links_,
                                                agent::OwnerOptions{.model = kModel,
                                                                    .rank_shards = shards,
                                                                    .rank_layouts = layouts,
                                                                    .ttl = options_.ttl,
                                                                    .cap = options_.cap,
                                                                    .max_leases = 64});
  claim_watch_ =
      std::make_unique<ClaimWatch>(host_, ranks_.front()->rpc(), ranks_.front()->watch());
  env.rpc.Handle(proto::Type::kPrefill,
                 [this](std::string_view body, const agent::ResponderPtr& responder) {
                   OnPrefill(body, responder);
                 });
}

SimPrefill::~SimPrefill() {
  for (const auto& rank : ranks_) rank->Freeze();
}

std::unique_ptr<SimRank> SimPrefill::TakeRank1() {
  if (options_.tp < 2) return nullptr;
  auto rank1 = std::move(ranks_.back());
  ranks_.pop_back();
  return rank1;
}

std::unique_ptr<SimRank> SimPrefill::NewRank(uint32_t rank) {
  return std::make_unique<SimRank>(host_,
                                   SimRankOptions{.engine = options_.engine,
                                                  .incarnation = host_.world.random.Next() | 1,
                                                  .rank = rank,
                                                  .tp = options_.tp,
                                                  .format = options_.format,
                                                  .engine_prefix = options_.prefix,
                                                  .mapped = options_.mapped});
}

void SimPrefill::RestartRank1() {
  if (options_.tp < 2) return;
  ranks_[1].reset();
  ++rank1_lives_;
  ranks_[1] = NewRank(1);
  prefixes_.clear();  // half of their KV is gone; leases that still hold blocks end by themselves
}

Result<BlockTable> SimPrefill::Take(uint32_t tokens) {
  const uint32_t count = (tokens + kBlockSize - 1) / kBlockSize;
  auto blocks = pool_->Allocate(count);
  while (!blocks.has_value()) {
    const auto idle = std::ranges::find_if(
        prefixes_, [](const auto& entry) { return entry.second.use_count() == 1; });
    if (idle == prefixes_.end()) break;
    prefixes_.erase(idle);
    blocks = pool_->Allocate(count);
  }
  return blocks;
}

void SimPrefill::OnPrefill(std::string_view body, const agent::ResponderPtr& responder) {
  const auto request = proto::Decode<proto::Prefill>(body);
  if (!request.has_value()) return responder->Fail(request.error());
  auto job = std::make_shared<Job>();
  job->responder = responder;
  job->prompt.prefix_tokens = static_cast<uint32_t>(request->system_ids.size());
  job->prompt.prefix = request->system_ids.empty() ? 0 : request->system_ids.front();
  job->prompt.own_tokens = static_cast<uint32_t>(request->token_ids.size());
  job->prompt.own = request->token_ids.front();
  const Prompt& prompt = job->prompt;
  if (prompt.prefix != 0) {
    auto& entry = prefixes_[prompt.prefix_hash()];
    if (!entry) {
      auto blocks = Take(prompt.prefix_tokens);
      if (!blocks.has_value()) {
        prefixes_.erase(prompt.prefix_hash());
        return responder->Fail(blocks.error());
      }
      entry = std::make_shared<Prefix>();
      entry->hash = prompt.prefix_hash();
      entry->tokens = prompt.prefix_tokens;
      entry->blocks = std::move(*blocks);
    }
    job->prefix = entry;
  }
  auto blocks = Take(prompt.own_tokens);
  if (!blocks.has_value()) return responder->Fail(blocks.error());
  job->blocks = std::move(*blocks);
  proto::PrefillReply accepted;
  accepted.accepted = true;
  responder->Reply(proto::Encode(accepted), true);
  job->offers_left = job->prefix ? 2 : 1;
  if (job->prefix) {
    owner_->Offer({.blocks = {job->prefix->blocks.Share(), 0},
                   .first_token = 0,
                   .tokens = prompt.prefix_tokens,
                   .hash = prompt.prefix_hash(),
                   .prefix = true,
                   .finished = job->prefix->complete,
                   .scales = {}},
                  [this, job](const Result<LeaseId>& lease) { OnOffered(job, true, lease); });
  }
  owner_->Offer({.blocks = {job->blocks.Share(), prompt.prefix_tokens},
                 .first_token = prompt.prefix_tokens,
                 .tokens = prompt.own_tokens,
                 .hash = prompt.hash(),
                 .prefix = false,
                 .finished = false,
                 .scales = {}},
                [this, job](const Result<LeaseId>& lease) { OnOffered(job, false, lease); });
}

void SimPrefill::OnOffered(const std::shared_ptr<Job>& job, bool prefix,
                           const Result<LeaseId>& lease) {
  --job->offers_left;
  if (!lease.has_value()) {
    job->failed = true;
    job->responder->Fail(lease.error());
  } else if (prefix) {
    job->prefix_lease = *lease;
    if (job->prefix->complete) {
      for (const auto& rank : ranks_) {
        const auto writer = rank->owner().Writer(*lease);
        if (writer) writer->Publish(Tokens(job->prompt.prefix_tokens));
      }
      owner_->MarkFinished(*lease);
    } else {
      job->prefix->leases.push_back(*lease);
    }
  } else {
    job->lease = *lease;
  }
  if (job->offers_left > 0) return;
  if (job->failed) return Abort(job, {Code::kLeaseEnded, "offer failed"});
  job->ticket = {
      .owner = options_.engine,
      .incarnation = links_->leader(),
      .front = endpoint(),
      .model = kModel,
      .prompt = {job->lease, job->prompt.hash(), job->prompt.prefix_tokens, job->prompt.own_tokens},
      .prefixes = {}};
  if (job->prefix) {
    job->ticket.prefixes.push_back(
        {job->prefix_lease, job->prompt.prefix_hash(), 0, job->prompt.prefix_tokens});
  }
  proto::PrefillReply reply;
  reply.ticket = job->ticket;
  job->responder->Reply(proto::Encode(reply), true);
  options_.on_ticket(job->prompt, job->ticket);
  jobs_.push_back(job);
  if (!working_) Work();
}

void SimPrefill::Work() {
  working_.reset();
  if (jobs_.empty()) return;
  working_ = jobs_.front();
  jobs_.pop_front();
  if (working_->responder->cancelled()) {
    return Abort(working_, {Code::kCancelled, "cancelled"});
  }
  if (working_->prefix && !working_->prefix->complete) {
    WorkPrefix(working_);
  } else {
    WorkOwn(working_);
  }
}

// The leases that a chunk counts for, on one rank.
std::vector<std::shared_ptr<agent::ProgressWriter>> SimPrefill::Writers(const Job& job, bool prefix,
                                                                        size_t rank) const {
  std::vector<std::shared_ptr<agent::ProgressWriter>> writers;
  const auto add = [&](const LeaseId& lease) {
    if (auto writer = ranks_[rank]->owner().Writer(lease)) writers.push_back(std::move(writer));
  };
  if (!prefix) add(job.lease);
  if (prefix) std::ranges::for_each(job.prefix->leases, add);
  return writers;
}

void SimPrefill::WriteOnRank(const Job& job, bool prefix, uint32_t count, size_t rank) {
  const Prompt& p = job.prompt;
  if (prefix) {
    WritePart(ranks_[rank]->memory(), job.prefix->blocks.blocks(), 0, p.prefix_hash(), job.done,
              count);
  } else {
    WritePart(ranks_[rank]->memory(), job.blocks.blocks(), p.prefix_tokens, p.hash(),
              p.prefix_tokens + job.done, count);
  }
  ranks_[rank]->watch().CheckLeases();
}

// One chunk on every rank, each at its own moment, and its progress at a later one, as a GPU's
// queue has it: with writers taken when the chunk was queued. `done(true)` when all ranks have it.
void SimPrefill::WriteChunk(const std::shared_ptr<Job>& job, bool prefix, uint32_t count,
                            std::function<void(bool)> done) {
  auto left = std::make_shared<size_t>(ranks_.size());
  const uint64_t life = rank1_lives_;
  const uint32_t tokens = (prefix ? 0 : job->prompt.prefix_tokens) + job->done + count;
  for (size_t rank = 0; rank < ranks_.size(); ++rank) {
    Process& leader = ranks_.front()->process();
    const auto soon = [this] { return std::chrono::microseconds(host_.world.random.Below(2000)); };
    const auto alive = [this, rank, life] { return rank == 0 || life == rank1_lives_; };
    leader.CallAfter(soon(), [this, &leader, soon, alive, job, prefix, count, tokens, rank, left,
                              life, done, writers = Writers(*job, prefix, rank)] {
      if (alive()) WriteOnRank(*job, prefix, count, rank);
      leader.CallAfter(soon(), [this, alive, tokens, rank, left, life, done, writers] {
        if (alive()) {
          for (const auto& writer : writers) writer->Publish(Tokens(tokens));
          ranks_[rank]->watch().CheckLeases();
        }
        if (--*left == 0) done(life == rank1_lives_);
      });
    });
  }
}

void SimPrefill::WorkPrefix(const std::shared_ptr<Job>& job) {
  const uint32_t count = std::min(kBlockSize, job->prompt.prefix_tokens - job->done);
  WriteChunk(job, true, count, [this, job, count](bool ok) {
    if (!ok) return Abort(job, {Code::kLeaseEnded, "rank 1 was lost"});
    job->done += count;
    if (job->done < job->prompt.prefix_tokens) return WorkPrefix(job);
    job->done = 0;
    job->prefix->complete = true;
    // Those that were offered while the last chunk was in the queue, too.
    for (const LeaseId& lease : std::exchange(job->prefix->leases, {})) {
      for (const auto& rank : ranks_) {
        const auto writer = rank->owner().Writer(lease);
        if (writer) writer->Publish(Tokens(job->prompt.prefix_tokens));
      }
      owner_->MarkFinished(lease);
    }
    WorkOwn(job);
  });
}

void SimPrefill::WorkOwn(const std::shared_ptr<Job>& job) {
  const uint32_t count = std::min(3U, job->prompt.own_tokens - job->done);
  WriteChunk(job, false, count, [this, job, count](bool ok) {
    if (!ok) return Abort(job, {Code::kLeaseEnded, "rank 1 was lost"});
    if (!Lives(job->lease)) {
      return Abort(job, {Code::kLeaseEnded, "the lease ended under the prefill"});
    }
    job->done += count;
    if (job->done < job->prompt.own_tokens) return WorkOwn(job);
    Finish(job);
  });
}

bool SimPrefill::Lives(const LeaseId& lease) const {
  return std::ranges::all_of(
      ranks_, [&lease](const auto& rank) { return rank->owner().Writer(lease) != nullptr; });
}

void SimPrefill::Finish(const std::shared_ptr<Job>& job) {
  owner_->MarkFinished(job->lease);
  proto::PrefillReply reply;
  reply.finished = true;
  job->responder->Reply(proto::Encode(reply), false);
  options_.on_finished(job->ticket);
  Work();
}

void SimPrefill::Abort(const std::shared_ptr<Job>& job, const Status& why) {
  if (!job->lease.IsZero()) owner_->Withdraw(job->lease, "aborted");
  if (!job->prefix_lease.IsZero()) owner_->Withdraw(job->prefix_lease, "aborted");
  job->responder->Fail(why);
  if (working_ == job) Work();
}

void SimPrefill::Check() {
  std::map<LeaseId, std::string> known;
  for (const agent::OwnerLeader::LeaseInfo& lease : owner_->List()) {
    known[lease.lease] = lease.state;
  }
  const TimePoint now = host_.world.Now();
  for (const auto& rank : ranks_) {
    rank->watch().CheckLeases();
    for (const agent::OwnerRank::LeaseInfo& live : rank->owner().List()) {
      const RankWatch::Started* started = rank->watch().Find(live.lease);
      if (started == nullptr || started->start.leader != links_->leader()) continue;
      const auto lease = known.find(live.lease);
      if (lease == known.end()) {
        host_.Violate(rank->endpoint() + " holds a lease that its leader let go of");
      } else if (lease->second != "ending" && now > started->at + options_.cap) {
        host_.Violate(options_.prefix + " a lease outlived the cap");
      }
    }
  }
}

uint64_t SimPrefill::Ended(const std::string& reason) const {
  return static_cast<uint64_t>(
      ranks_.front()->counters().Get("kvrelay_leases_ended_total{reason=\"" + reason + "\"}"));
}

bool SimPrefill::AtRest() const {
  uint32_t cached = 0;
  for (const auto& [hash, prefix] : prefixes_) cached += prefix->blocks.size();
  return !working_ && jobs_.empty() && owner_->live_leases() == 0 &&
         pool_->used_blocks() == cached && std::ranges::all_of(ranks_, [](const auto& rank) {
           return rank->operations() == 0 && rank->owner().List().empty();
         });
}

std::string SimPrefill::State() const {
  std::string s = options_.prefix + " leases " + std::to_string(owner_->live_leases()) + " used " +
                  std::to_string(pool_->used_blocks()) + " jobs " + std::to_string(jobs_.size()) +
                  (working_ ? " working" : "");
  for (const auto& rank : ranks_) {
    s += " [ops " + std::to_string(rank->operations()) + " rank leases " +
         std::to_string(rank->owner().List().size()) + "]";
  }
  return s;
}

}  // namespace kvrelay::sim
