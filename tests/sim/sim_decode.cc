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
                              .mapped = options_.mapped}));
    endpoints.push_back(ranks_.back()->endpoint());
  }
  agent::Env& env = ranks_.front()->env();
  const Incarnation incarnation = host_.world.random.Next() | 1;
  links_ = std::make_unique<agent::RankLinks>(env, incarnation, endpoints);
  claims_ = std::make_unique<agent::Claims>(env, agent::EngineKey{options_.engine, incarnation});
  context_ = std::make_unique<agent::ReaderContext>(agent::ReaderContext{
      .env = env, .claims = *claims_, .ranks = *links_, .model = kModel, .block_size = kBlockSize});
  prefixes_ = std::make_unique<agent::PrefixTable>(*context_, store_, *pool_);
  prefills_ = std::make_unique<agent::PrefillPool>(env.clock, options_.prefills);
}

SimDecode::~SimDecode() {
  for (const auto& rank : ranks_) rank->Freeze();
}

void SimDecode::Request(const Prompt& prompt, Duration cancel_after, Duration hold) {
  const uint32_t count = (prompt.own_tokens + kBlockSize - 1) / kBlockSize;
  auto blocks = pool_->Allocate(count);
  while (!blocks.has_value() && store_.EvictOne()) blocks = pool_->Allocate(count);
  if (!blocks.has_value()) {
    ++outcomes_.no_room;
    return;
  }
  Clock& clock = ranks_.front()->process();
  const uint64_t id = next_++;
  auto active = std::make_shared<Active>();
  active_[id] = active;
  active->prompt = prompt;
  active->blocks = std::move(*blocks);
  active->deadline = clock.Now() + options_.request_timeout;
  agent::FetchRequest request{
      .request_id = std::to_string(id),
      .system_ids = std::vector<uint32_t>(prompt.prefix_tokens, prompt.prefix),
      .token_ids = std::vector<uint32_t>(prompt.own_tokens, prompt.own),
      .prompt_hash = prompt.hash(),
      .prefix_hash = prompt.prefix_hash(),
      .prefix_tokens = prompt.prefix_tokens,
      .blocks = [active] { return active->blocks.Share(); },
      .deadline = active->deadline};
  active->fetch = std::make_shared<agent::Fetch>(
      *context_, *prefixes_, *prefills_,
      agent::FetchOptions{
          .max_retries = 2, .accept_timeout = Millis(1500), .load_timeout = Millis(3000)},
      std::move(request), [this, active, hold, id](const Result<agent::FetchResult>& result) {
        active->over = true;
        OnFetched(id, active, result);
        if (!result.has_value()) return;
        // It decodes for a while, and leaves.
        ranks_.front()->process().CallAfter(hold, [this, id, active] {
          Check(*active, "after decoding");
          active_.erase(id);
        });
      });
  active->fetch->Start();
  clock.CallAfter(cancel_after, [active] {
    if (!active->over) active->fetch->Cancel({Code::kCancelled, "the user left"});
  });
  clock.CallAt(active->deadline + Millis(500), [this, active] {
    if (!active->over && outcomes_.violation.empty()) {
      outcomes_.violation = "a request did not end by its deadline: " + State();
    }
  });
}

void SimDecode::OnFetched(uint64_t id, const std::shared_ptr<Active>& active,
                          const Result<agent::FetchResult>& result) {
  // Its last callback is on the stack.
  ranks_.front()->process().CallAfter({}, [fetch = std::move(active->fetch)] {});
  if (!result.has_value()) {
    ++(result.error().code() == Code::kCancelled ? outcomes_.cancelled : outcomes_.failed);
    active_.erase(id);
    return;
  }
  ++outcomes_.served;
  outcomes_.retried += result->retries;
  if (result->load.prefix_hit) ++outcomes_.prefix_hits;
  active->prefix = result->load.prefix;
  Check(*active, "when served");
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
    if (!right && outcomes_.violation.empty()) {
      outcomes_.violation = std::string("wrong bytes were served (") + when + ")";
    }
  }
}

bool SimDecode::AtRest() const {
  uint32_t cached = 0;
  for (const SystemPrefixStore::Info& info : store_.List()) cached += info.tokens / kBlockSize;
  return active_.empty() && claims_->held() == 0 && claims_->unacknowledged() == 0 &&
         prefixes_->waiting() == 0 && context_->quarantined_blocks == 0 &&
         pool_->used_blocks() == cached && std::ranges::all_of(ranks_, [](const auto& rank) {
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
