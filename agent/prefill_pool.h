// The prefill workers that a decode engine may ask: which one next, and which to leave alone for a
// while.
#pragma once

#include <cstdint>
#include <optional>
#include <set>
#include <string>
#include <string_view>
#include <vector>

#include "base/clock.h"
#include "base/ids.h"
#include "base/status.h"

namespace kvrelay::agent {

// Control thread of the leader. Fewest outstanding prompt tokens first, ties by rotation. Three
// failures in a row set a worker aside for 1 s, doubling to 30 s; then one request at a time tries
// it, and a success brings it back.
class PrefillPool {
 public:
  enum class State : uint8_t { kUnknown, kReady, kUnreachable, kIncompatible, kDraining };

  static std::string_view StateName(State state);  // "ready", "unreachable", ...

  PrefillPool(const Clock& clock, std::vector<std::string> endpoints);

  // An endpoint to send `tokens` to, none of `avoid` unless there is no other; nothing when all are
  // set aside. Pair each with Done.
  std::optional<std::string> Pick(uint32_t tokens, const std::set<std::string>& avoid);
  // The request that was sent there is over. kOk counts as success; codes that say nothing about
  // the worker's health (kCancelled, kTooLarge, kOverloaded) as neither.
  void Done(const std::string& endpoint, uint32_t tokens, Code outcome);
  // What a probe found out.
  void SetState(const std::string& endpoint, State state, const std::string& why);
  // Which process answers there. A new one has a clean slate: its predecessor's failures are gone.
  void SetIncarnation(const std::string& endpoint, Incarnation incarnation);

  struct Info {
    std::string endpoint;
    State state = State::kUnknown;
    std::string why;
    uint64_t outstanding_tokens = 0;
    int failures = 0;
  };
  std::vector<Info> List() const;
  // What to tell a request for which Pick had nothing: every worker with its state and why.
  // kIncompatible or kDraining when all of them are, else kPeerUnreachable.
  Status WhyNone() const;
  // Some worker answered when last heard of, and is not set aside.
  bool AnyUsable() const;
  const std::vector<std::string>& endpoints() const { return endpoints_; }

 private:
  struct Worker {
    std::string endpoint;
    State state = State::kUnknown;
    std::string why;
    Incarnation incarnation = 0;
    uint64_t outstanding_tokens = 0;
    uint32_t outstanding = 0;
    int failures = 0;  // in a row
    Duration aside{};  // the last time aside
    TimePoint aside_until;
    uint64_t last_pick = 0;
  };
  Worker* Find(const std::string& endpoint);
  bool Usable(const Worker& worker) const;

  const Clock& clock_;
  std::vector<std::string> endpoints_;
  std::vector<Worker> workers_;
  uint64_t picks_ = 0;
};

}  // namespace kvrelay::agent
