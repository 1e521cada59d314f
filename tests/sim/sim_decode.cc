#include "tests/sim/sim_decode.h"

#include <algorithm>
#include <utility>

namespace kvrelay::sim {

SimDecode::SimDecode(Host& host, Options options, Outcomes& outcomes)
    : host_(host), options_(std::move(options)), outcomes_(outcomes) {
  std::vector<std::string> endpoints;
  for (uint32_t rank = 0; rank < options_.tp; ++rank) {
    ranks_.push_back(std::make_unique<SimRank>(
        host_, SimRankOptions{.engine = options_.engine,
                              .incarnation = host_.world.random.Next() | 1,
                              .rank = rank,
                              .tp = options_.tp,
                              .format = options_.format,
                              .engine_prefix = options_.prefix,
                              .mapped = options_.mapped,
                              .max_asked_bytes = options_.max_asked_bytes}));
    endpoints.push_back(ranks_.back()->endpoint());
  }
  agent::Env& env = ranks_.front()->env();
  const Incarnation incarnation = host_.world.random.Next() | 1;
  links_ = std::make_unique<agent::RankLinks>(env, incarnation, endpoints);
  claims_ = std::make_unique<agent::Claims>(env, agent::EngineKey{options_.engine, incarnation});
  context_ = std::make_unique<agent::ReaderContext>(
      agent::ReaderContext{.env = env, .claims = *claims_, .ranks = *links_, .model = kModel});
  prefixes_ = std::make_unique<agent::PrefixTable>(*context_, store_, *pool_, kBlockSize);
  prefills_ = std::make_unique<agent::PrefillPool>(env.clock, options_.prefills);
}

SimDecode::~SimDecode() {
  for (const auto& rank : ranks_) rank->Freeze();
}

std::shared_ptr<SimDecode::Active> SimDecode::Admit(const Prompt& prompt) {
  const uint32_t count = (prompt.own_tokens + kBlockSize - 1) / kBlockSize;
  auto blocks = pool_->Allocate(count);
  while (!blocks.has_value() && store_.EvictOne()) blocks = pool_->Allocate(count);
  if (!blocks.has_value()) {
    ++outcomes_.no_room;
    return nullptr;
  }
  auto active = std::make_shared<Active>();
  active->id = next_++;
  active_[active->id] = active;
  active->prompt = prompt;
  active->blocks = std::move(*blocks);
  Clock& clock = ranks_.front()->process();
  active->deadline = clock.Now() + options_.request_timeout;
  clock.CallAt(active->deadline + Millis(500), [this, active] {
    if (!active->over) host_.Violate("a request did not end by its deadline: " + State());
  });
  return active;
}

void SimDecode::Request(const Prompt& prompt, Duration cancel_after, Duration hold) {
  const auto active = Admit(prompt);
  if (!active) return;
  active->hold = hold;
  agent::FetchRequest request{
      .request_id = std::to_string(active->id),
      .system_ids = std::vector<uint32_t>(prompt.prefix_tokens, prompt.prefix),
      .token_ids = std::vector<uint32_t>(prompt.own_tokens, prompt.own),
      .prompt_hash = prompt.hash(),
      .prefix_hash = prompt.prefix_hash(),
      .prefix_tokens = prompt.prefix_tokens,
      .prefix_names = prompt.prefix_names(),
      .blocks =
          [active] { return HeldTables(active->blocks.Share(), active->prompt.prefix_tokens); },
      .priority = options_.priority,
      .deadline = active->deadline};
  const auto fetch = std::make_shared<agent::Fetch>(
      *context_, *prefixes_, *prefills_,
      agent::FetchOptions{
          .max_retries = 2, .accept_timeout = Millis(1500), .load_timeout = Millis(3000)},
      std::move(request),
      [this, active](const Result<agent::FetchResult>& result) { OnFetched(active, result); });
  active->fetch = fetch;
  fetch->Start();
  ranks_.front()->process().CallAfter(cancel_after, [active] {
    const auto fetch = active->fetch.lock();
    if (!active->over && fetch) fetch->Cancel({Code::kCancelled, "the user left"});
  });
}

void SimDecode::OnFetched(const std::shared_ptr<Active>& active,
                          const Result<agent::FetchResult>& result) {
  if (!result.has_value()) return Fail(active, result.error());
  ++outcomes_.served;
  outcomes_.retried += result->retries;
  if (result->load.prefix_hit) ++outcomes_.prefix_hits;
  Decode(active, result->load.prefix);
}

void SimDecode::Load(const Prompt& prompt, const proto::Ticket& ticket, Duration hold) {
  const auto active = Admit(prompt);
  if (!active) return;
  active->hold = hold;
  active->lease = ticket.prompt.lease;
  const auto load = std::make_shared<agent::Load>(
      *context_, *prefixes_,
      agent::LoadRequest{.ticket = ticket,
                         .blocks = {active->blocks.Share(), prompt.prefix_tokens},
                         .deadline = active->deadline},
      agent::Load::Events{
          .finished =
              [this, active](const Result<agent::LoadResult>& result) { OnLoaded(active, result); },
          .drained = [] {}});
  active->load = load;
  load->Start();
}

void SimDecode::SetReady(const proto::Ticket& ticket) {
  for (const auto& [id, active] : active_) {
    const auto load = active->load.lock();
    if (load && active->lease == ticket.prompt.lease) load->SetReady();
  }
}

void SimDecode::OnLoaded(const std::shared_ptr<Active>& active,
                         const Result<agent::LoadResult>& result) {
  if (!result.has_value()) return Fail(active, result.error());
  ++outcomes_.loaded;
  Decode(active, result->prefix);
}

void SimDecode::Fail(const std::shared_ptr<Active>& active, const Status& status) {
  active->over = true;
  outcomes_.last_failure = status.ToString();
  switch (status.code()) {
    case Code::kCancelled:
      ++outcomes_.cancelled;
      break;
    case Code::kOverloaded:
      ++outcomes_.no_room;
      break;
    default:
      ++outcomes_.failed;
  }
  Leave(active);
}

void SimDecode::Decode(const std::shared_ptr<Active>& active, PrefixRef prefix) {
  active->over = true;
  active->prefix = std::move(prefix);
  Check(*active, "when served");
  ranks_.front()->process().CallAfter(active->hold, [this, active] {
    Check(*active, "after decoding");
    Leave(active);
  });
}

// Timers may know it for a while still.
void SimDecode::Leave(const std::shared_ptr<Active>& active) {
  active->blocks.Reset();
  active->prefix.reset();
  active_.erase(active->id);
}

void SimDecode::Check(const Active& active, const char* when) {
  const Prompt& prompt = active.prompt;
  for (const auto& rank : ranks_) {
    bool right = CheckPart(rank->memory(), active.blocks.blocks(), prompt.prefix_tokens,
                           prompt.hash(), prompt.prefix_tokens, prompt.own_tokens);
    if (prompt.prefix != 0) {
      right = right && active.prefix &&
              CheckPart(rank->memory(), active.prefix->blocks.blocks(), 0, prompt.prefix_hash(), 0,
                        prompt.prefix_tokens);
    }
    if (!right) host_.Violate(std::string("wrong bytes were served (") + when + ")");
  }
}

uint64_t SimDecode::Retries(const std::string& reason) const {
  return static_cast<uint64_t>(
      ranks_.front()->counters().Get("kvrelay_retries_total{reason=\"" + reason + "\"}"));
}

bool SimDecode::AtRest() const {
  return active_.empty() && claims_->held() == 0 && claims_->unacknowledged() == 0 &&
         prefixes_->waiting() == 0 && context_->quarantined_blocks == 0 &&
         pool_->used_blocks() == store_.idle_blocks() &&
         std::ranges::all_of(ranks_, [](const auto& rank) {
           return rank->operations() == 0 && rank->sessions() == 0;
         });
}

std::string SimDecode::State() const {
  std::string s =
      options_.prefix + " active " + std::to_string(active_.size()) + " claims " +
      std::to_string(claims_->held()) + " releasing " + std::to_string(claims_->unacknowledged()) +
      " waiting " + std::to_string(prefixes_->waiting()) + " quarantine " +
      std::to_string(context_->quarantined_blocks) + " used " +
      std::to_string(pool_->used_blocks()) + " prefixes " + std::to_string(store_.size());
  for (const auto& rank : ranks_) {
    s += " [ops " + std::to_string(rank->operations()) + " sessions " +
         std::to_string(rank->sessions()) + "]";
  }
  return s;
}

}  // namespace kvrelay::sim
