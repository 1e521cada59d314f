// One-sided reads that follow a prompt while it is computed.
#pragma once

#include "kvcache/owned_side.h"
#include "kvcache/plan_pull.h"
#include "kvcache/shard.h"
#include "transport/transport.h"

namespace kvrelay::agent {

// What the lease's progress newly allows of `source`'s heads and `tokens`, portion by portion.
// kStaleRead when the guard words are not the lease's. Runs on the transfer thread, whatever
// becomes of the session.
transport::NextPortion Follow(OwnedSide owner, OwnedSide reader, const PullSource& source,
                              TokenRange tokens, const GuardExpectation& want);

}  // namespace kvrelay::agent
