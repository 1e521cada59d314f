// A rank's view of its engine's leader: which incarnation of it counts. A restarted leader says
// HELLO first, and everything that the former one had asked for ends before the answer leaves.
#pragma once

#include <functional>
#include <vector>

#include "agent/env.h"

namespace kvrelay::agent {

// Control thread.
class LeaderLink {
 public:
  // `rank_incarnation` goes into the answer, so that the leader learns of a restarted rank. Handles
  // kHello on env.rpc.
  LeaderLink(Env& env, Incarnation rank_incarnation);

  // 0 before the first HELLO.
  Incarnation leader() const { return leader_; }
  // kRefused when `leader` is not the one that said HELLO last.
  Status Check(Incarnation leader) const;
  // Runs when another incarnation of the leader took over.
  void OnNewLeader(std::function<void()> fn) { on_new_leader_.push_back(std::move(fn)); }

 private:
  Incarnation leader_ = 0;
  uint64_t challenge_ = 0;  // the newest; 0: none is open
  std::vector<std::function<void()>> on_new_leader_;
};

}  // namespace kvrelay::agent
