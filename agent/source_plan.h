// What one source gives to a pull: where its lease's record lies, what the record must say, and
// which bytes go where.
#pragma once

#include "agent/owner_rank.h"
#include "agent/peer_table.h"
#include "base/status.h"
#include "kvcache/copy_plan.h"
#include "kvcache/lease_record.h"
#include "kvcache/plan_pull.h"
#include "kvcache/request_scales.h"
#include "proto/messages.h"
#include "transport/transport.h"

namespace kvrelay::agent {

struct SourcePlan {
  transport::GuardRef guard;
  GuardExpectation want;  // around all of it
  CopyPlan whole;
};

// `source` is one of AssignSources for `pull.claim`'s ranks; `peer` is the rank it names. `scales`,
// of all sources of the pull, take this one's where they come with the request.
// kIncompatible when the claim's answer contradicts the handshake; else as PlanPull, which refuses
// before anything moves what cannot be planned.
Result<SourcePlan> PlanSource(const proto::Pull& pull, const RankIdentity& identity,
                              const PullSource& source, const ReadyPeer& peer, TakenScales& scales);

}  // namespace kvrelay::agent
