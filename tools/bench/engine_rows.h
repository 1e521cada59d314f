// What benchmarks of whole engines share: rows of KV that say which they are, tickets, and answers
// from an agent's control thread.
#pragma once

#include <chrono>
#include <cstdint>
#include <cstring>
#include <functional>
#include <future>
#include <span>
#include <utility>

#include "agent/engine_agent.h"
#include "kvcache/kv_view.h"
#include "proto/ticket.h"
#include "tools/bench/must.h"

namespace kvrelay::bench {

// What a row holds, of all that is computed: its words say which it is, again and again.
struct RowName {
  uint32_t layer = 0;
  uint32_t head = 0;
  uint32_t token = 0;
  uint32_t v = 0;
  bool operator==(const RowName&) const = default;

  void Fill(std::byte* row, uint64_t bytes) const {
    for (uint64_t at = 0; at < bytes; at += sizeof(*this)) {
      std::memcpy(row + at, this, sizeof(*this));
    }
  }
  bool Fills(const std::byte* row, uint64_t bytes) const {
    for (uint64_t at = 0; at < bytes; at += sizeof(*this)) {
      if (std::memcmp(row + at, this, sizeof(*this)) != 0) return false;
    }
    return true;
  }
};

// visit(row, its name) for every row that a rank has of `tokens` tokens.
template <typename Visit>
void ForEachRow(const KvView& view, const KvShard& shard, std::span<const BlockId> blocks,
                uint32_t tokens, Visit visit) {
  const uint32_t block_size = view.layout().block_size;
  for (uint32_t layer = 0; layer < shard.layer_count; ++layer) {
    for (uint32_t token = 0; token < tokens; ++token) {
      const BlockId block = blocks[token / block_size];
      const uint32_t at = token % block_size;
      for (uint32_t head = 0; head < shard.head_count; ++head) {
        const uint32_t name = shard.head_begin + head;
        visit(view.K(layer, block, head, at), RowName{layer, name, token, 0});
        visit(view.V(layer, block, head, at), RowName{layer, name, token, 1});
      }
    }
  }
}

// Runs `make` on the leader's control thread, which calls what it is given with the result.
template <typename T>
T Await(agent::EngineAgent& agent, const std::function<void(std::function<void(T)>)>& make) {
  std::promise<T> promise;
  agent.Post([&] { make([&promise](T value) { promise.set_value(std::move(value)); }); });
  auto future = promise.get_future();
  Check(future.wait_for(std::chrono::seconds(60)) == std::future_status::ready,
        "no answer within a minute");
  return future.get();
}

inline ContentHash AnyHash() {
  ContentHash hash;
  hash.bytes[0] = 2;
  return hash;
}

// Of these blocks, as the KV of `tokens` tokens that are yet to be computed.
inline LeaseId OfferAll(agent::EngineAgent& agent, const BlockTable& blocks, uint32_t tokens) {
  return Must(Await<Result<LeaseId>>(agent, [&](std::function<void(Result<LeaseId>)> offered) {
    agent::OfferRequest offer;
    offer.blocks = {blocks.Share(), 0};
    offer.tokens = tokens;
    offer.hash = AnyHash();
    agent.owner().Offer(std::move(offer), std::move(offered));
  }));
}

inline proto::Ticket TicketOf(const agent::EngineAgent& agent, const LeaseId& lease,
                              uint32_t tokens) {
  proto::Ticket ticket;
  ticket.owner = agent.engine();
  ticket.incarnation = agent.incarnation();
  ticket.front = agent.endpoint();
  ticket.model = agent.model();
  ticket.prompt.lease = lease;
  ticket.prompt.hash = AnyHash();
  ticket.prompt.tokens = tokens;
  return ticket;
}

}  // namespace kvrelay::bench
