// An engine without a model: agents over a cache whose blocks are 4 KiB, for benchmarks of the
// agents themselves.
#pragma once

#include <functional>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "agent/engine_agent.h"
#include "base/status.h"
#include "kvcache/block_pool.h"
#include "kvcache/prefix_store.h"
#include "kvcache/region.h"

namespace kvrelay::tools {

// Its agent's threads run from Create to the end.
class EngineSide {
 public:
  static constexpr uint32_t kBlockTokens = 16;
  static constexpr uint64_t kBlockBytes = 4096;  // K and V, 2 KiB each

  // `curve`: keys of the agents; null: none.
  static Result<std::unique_ptr<EngineSide>> Create(
      const std::string& run_dir, uint32_t blocks,
      std::shared_ptr<const transport::CurveIdentity> curve);
  ~EngineSide() { agent_->Shutdown(); }
  EngineSide(const EngineSide&) = delete;
  EngineSide& operator=(const EngineSide&) = delete;

  agent::EngineAgent& agent() { return *agent_; }
  // Offers `count` prompts of one block each, all at once, published; their tickets when all are
  // offered. kDeadlineExceeded after a minute, kOverloaded without enough blocks.
  Result<std::vector<proto::Ticket>> Offer(uint32_t count);
  // On the agent's control thread: claims what the ticket offers, and from its SetReady on pulls it
  // into a block of our own. Null when none is free.
  std::shared_ptr<agent::Load> Claim(const proto::Ticket& ticket, agent::Load::Events events);
  // The same with SetReady, and the block is free again before `finished`.
  void Load(const proto::Ticket& ticket, std::function<void(Result<agent::LoadResult>)> finished);

 private:
  EngineSide(Region kv, uint32_t blocks) : kv_(std::move(kv)), pool_(BlockPool::Create(blocks)) {}

  Region kv_;
  std::shared_ptr<BlockPool> pool_;
  SystemPrefixStore prefixes_{1};
  std::unique_ptr<agent::EngineAgent> agent_;
};

}  // namespace kvrelay::tools
