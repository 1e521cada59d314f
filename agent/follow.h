// One-sided reads that follow a prompt while it is computed.
#pragma once

#include <cstdint>
#include <vector>

#include "kvcache/plan_pull.h"
#include "kvcache/shard.h"
#include "transport/transport.h"

namespace kvrelay::agent {

// One side of a read, by value: it runs on the transfer thread, whatever becomes of the session.
struct FollowSide {
  KvLayout layout;
  KvShard shard;
  std::vector<BlockId> blocks;
  uint32_t first_token = 0;

  PullSide view() const { return {layout, shard, {blocks, first_token}}; }
};

// What the lease's progress newly allows of `source`'s heads and `tokens`, portion by portion.
// kStaleRead when the guard words are not the lease's.
transport::NextPortion Follow(FollowSide owner, FollowSide reader, const PullSource& source,
                              TokenRange tokens, const GuardExpectation& want);

}  // namespace kvrelay::agent
