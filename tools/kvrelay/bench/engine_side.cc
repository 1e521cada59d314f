#include "tools/kvrelay/bench/engine_side.h"

#include <chrono>
#include <condition_variable>
#include <mutex>
#include <optional>
#include <utility>

namespace kvrelay::tools {
namespace {

constexpr Duration kAtMost = std::chrono::minutes(1);

KvLayout LayoutOf(uint32_t blocks) {
  return KvLayout::Dense(KvFormat::kNhd, DType::kBf16, 1, 1, 64, EngineSide::kBlockTokens, blocks);
}

}  // namespace

Result<std::unique_ptr<EngineSide>> EngineSide::Create(
    const std::string& run_dir, uint32_t blocks,
    std::shared_ptr<const transport::CurveIdentity> curve) {
  const KvLayout layout = LayoutOf(blocks);
  KVRELAY_ASSIGN_OR_RETURN(Region kv, Region::AllocateHost(layout.dense_bytes(), "kvrelay-bench"));
  std::unique_ptr<EngineSide> side(new EngineSide(std::move(kv), blocks));
  KVRELAY_ASSIGN_OR_RETURN(const KvShard shard, KvShard::Make(1, 1, 1, 0));
  agent::EngineAgentOptions options;
  options.model.bytes[0] = 1;
  options.model_name = "benchmark";
  options.block_size = kBlockTokens;
  options.transport = "mapped";
  options.run_dir = run_dir;
  options.record_slots = blocks;
  options.curve = std::move(curve);
  options.lease_ttl = kAtMost * 5;
  KVRELAY_ASSIGN_OR_RETURN(
      side->agent_, agent::EngineAgent::Create(std::move(options), {{layout, shard, {&side->kv_}}},
                                               side->pool_, side->prefixes_));
  side->agent_->Run();
  return side;
}

Result<std::vector<proto::Ticket>> EngineSide::Offer(uint32_t count) {
  struct Gather {
    std::mutex mutex;
    std::condition_variable done;
    std::vector<proto::Ticket> tickets;
    Status failure;
    uint32_t left = 0;
  };
  const auto gather = std::make_shared<Gather>();
  gather->left = count;
  agent_->Post([this, gather, count] {
    for (uint32_t i = 0; i < count; ++i) {
      agent::OfferRequest offer;
      const auto end = [gather](const Status& status) {
        const std::lock_guard lock(gather->mutex);
        if (!status.ok()) gather->failure = status;
        if (--gather->left == 0) gather->done.notify_one();
      };
      auto blocks = pool_->Allocate(1);
      if (!blocks.has_value()) {
        end(blocks.error());
        continue;
      }
      offer.blocks = {std::move(*blocks), 0};
      offer.tokens = kBlockTokens;
      offer.hash.bytes[0] = 1;
      offer.finished = true;
      agent_->owner().Offer(std::move(offer), [this, gather, end](const Result<LeaseId>& lease) {
        if (!lease.has_value()) return end(lease.error());
        agent_->Writer(0, *lease)->Publish(
            {.tokens = kBlockTokens, .chunk_end = kBlockTokens, .layers = 0});
        proto::Ticket ticket{
            .owner = agent_->engine(),
            .incarnation = agent_->incarnation(),
            .front = agent_->endpoint(),
            .model = agent_->model(),
            .prompt = {.lease = *lease, .hash = {}, .first_token = 0, .tokens = kBlockTokens},
            .prefixes = {}};
        ticket.prompt.hash.bytes[0] = 1;
        {
          const std::lock_guard lock(gather->mutex);
          gather->tickets.push_back(std::move(ticket));
        }
        end({});
      });
    }
  });
  std::unique_lock lock(gather->mutex);
  if (!gather->done.wait_for(lock, kAtMost, [&] { return gather->left == 0; })) {
    return Error(Code::kDeadlineExceeded, std::to_string(gather->left) + " leases of " +
                                              std::to_string(count) + " are not offered yet");
  }
  if (!gather->failure.ok()) return Error(gather->failure);
  return std::move(gather->tickets);
}

std::shared_ptr<agent::Load> EngineSide::Claim(const proto::Ticket& ticket,
                                               agent::Load::Events events) {
  auto blocks = pool_->Allocate(1);
  if (!blocks.has_value()) return nullptr;
  return agent_->StartLoad({.ticket = ticket,
                            .blocks = {std::move(*blocks), 0},
                            .deadline = agent_->env().clock.Now() + kAtMost},
                           std::move(events));
}

void EngineSide::Load(const proto::Ticket& ticket,
                      std::function<void(Result<agent::LoadResult>)> finished) {
  // One answer when both have happened.
  auto result = std::make_shared<std::optional<Result<agent::LoadResult>>>();
  const auto load =
      Claim(ticket, {.finished = [result](Result<agent::LoadResult> r) { *result = std::move(r); },
                     .drained = [result, finished] { finished(std::move(result->value())); }});
  if (load == nullptr) return finished(Error(Code::kOverloaded, "no block is free"));
  load->SetReady();
}

}  // namespace kvrelay::tools
