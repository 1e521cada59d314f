// The leader's view of its own ranks: which process each is, and that each follows this incarnation
// of the leader.
#pragma once

#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "agent/call.h"
#include "agent/env.h"

namespace kvrelay::agent {

// Control thread of the leader. Says HELLO to every rank until it answers.
class RankLinks {
 public:
  RankLinks(Env& env, Incarnation leader, std::vector<std::string> endpoints);

  size_t size() const { return ranks_.size(); }
  const std::vector<std::string>& endpoints() const { return endpoints_; }
  Incarnation leader() const { return leader_; }
  // 0 until the rank answered.
  Incarnation incarnation(size_t rank) const { return ranks_[rank].incarnation; }
  bool AllKnown() const;
  // Runs once: now or when every rank has answered.
  void WhenAllKnown(std::function<void()> fn);
  // A rank answered that it is another process than we thought: says HELLO anew.
  void Renew(size_t rank);

 private:
  struct Link {
    Incarnation incarnation = 0;
    std::unique_ptr<RetryingCall> hello;
  };
  void SayHello(size_t rank, uint64_t challenge);

  Env& env_;
  const Incarnation leader_;
  const std::vector<std::string> endpoints_;
  std::vector<Link> ranks_;
  std::vector<std::function<void()>> waiting_;
};

}  // namespace kvrelay::agent
