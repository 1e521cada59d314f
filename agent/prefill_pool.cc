#include "agent/prefill_pool.h"

#include <algorithm>
#include <tuple>
#include <utility>

namespace kvrelay::agent {
namespace {

constexpr int kFailuresBeforeAside = 3;
constexpr Duration kFirstAside = Millis(1000);
constexpr Duration kLongestAside = Millis(30'000);

}  // namespace

PrefillPool::PrefillPool(const Clock& clock, std::vector<std::string> endpoints)
    : clock_(clock), endpoints_(std::move(endpoints)) {
  for (const std::string& endpoint : endpoints_) {
    Worker& worker = workers_.emplace_back();
    worker.endpoint = endpoint;
  }
}

PrefillPool::Worker* PrefillPool::Find(const std::string& endpoint) {
  const auto it = std::ranges::find(workers_, endpoint, &Worker::endpoint);
  return it == workers_.end() ? nullptr : &*it;
}

bool PrefillPool::Usable(const Worker& worker) const {
  if (worker.state == State::kIncompatible || worker.state == State::kDraining) return false;
  if (worker.failures < kFailuresBeforeAside) return true;
  return clock_.Now() >= worker.aside_until && worker.outstanding == 0;  // one trial at a time
}

std::optional<std::string> PrefillPool::Pick(uint32_t tokens, const std::set<std::string>& avoid) {
  Worker* best = nullptr;
  const auto rank = [&avoid](const Worker& worker) {
    return std::tuple(avoid.contains(worker.endpoint), worker.state == State::kUnreachable,
                      worker.outstanding_tokens, worker.last_pick);
  };
  for (Worker& worker : workers_) {
    if (!Usable(worker)) continue;
    if (best == nullptr || rank(worker) < rank(*best)) best = &worker;
  }
  if (best == nullptr) return std::nullopt;
  best->outstanding_tokens += tokens;
  ++best->outstanding;
  best->last_pick = ++picks_;
  return best->endpoint;
}

void PrefillPool::Done(const std::string& endpoint, uint32_t tokens, Code outcome) {
  Worker* worker = Find(endpoint);
  if (worker == nullptr) return;
  worker->outstanding_tokens -= std::min<uint64_t>(tokens, worker->outstanding_tokens);
  if (worker->outstanding > 0) --worker->outstanding;
  switch (outcome) {
    case Code::kOk:
      worker->failures = 0;
      worker->aside = {};
      worker->state = State::kReady;
      worker->why.clear();
      return;
    case Code::kCancelled:
    case Code::kTooLarge:
    case Code::kOverloaded:
      return;
    case Code::kDraining:
      worker->state = State::kDraining;
      return;
    case Code::kIncompatible:
      worker->state = State::kIncompatible;
      return;
    case Code::kPeerUnreachable:
      worker->state = State::kUnreachable;
      break;
    default:
      break;
  }
  if (++worker->failures >= kFailuresBeforeAside) {
    worker->aside = std::clamp(worker->aside * 2, kFirstAside, kLongestAside);
    worker->aside_until = clock_.Now() + worker->aside;
  }
}

void PrefillPool::SetState(const std::string& endpoint, State state, const std::string& why) {
  Worker* worker = Find(endpoint);
  if (worker == nullptr) return;
  worker->state = state;
  worker->why = why;
}

void PrefillPool::SetIncarnation(const std::string& endpoint, Incarnation incarnation) {
  Worker* worker = Find(endpoint);
  if (worker == nullptr || std::exchange(worker->incarnation, incarnation) == incarnation) return;
  worker->failures = 0;
  worker->aside = {};
}

std::vector<PrefillPool::Info> PrefillPool::List() const {
  std::vector<Info> list;
  for (const Worker& w : workers_) {
    list.push_back({w.endpoint, w.state, w.why, w.outstanding_tokens, w.failures});
  }
  return list;
}

std::string_view PrefillPool::StateName(State state) {
  switch (state) {
    case State::kUnknown:
      return "unknown";
    case State::kReady:
      return "ready";
    case State::kUnreachable:
      return "unreachable";
    case State::kIncompatible:
      return "incompatible";
    case State::kDraining:
      return "draining";
  }
  return "unknown";
}

Status PrefillPool::WhyNone() const {
  const auto all_are = [this](State state) {
    return !workers_.empty() && std::ranges::all_of(workers_, [state](const Worker& worker) {
      return worker.state == state;
    });
  };
  const Code code = all_are(State::kIncompatible) ? Code::kIncompatible
                    : all_are(State::kDraining)   ? Code::kDraining
                                                  : Code::kPeerUnreachable;
  std::string message = "no prefill worker can be used now";
  for (const Worker& worker : workers_) {
    message += (&worker == &workers_.front() ? ": " : "; ") + worker.endpoint + " " +
               std::string(StateName(worker.state));
    if (!worker.why.empty()) message += " (" + worker.why + ")";
    if (worker.failures >= kFailuresBeforeAside) {
      message += ", set aside after " + std::to_string(worker.failures) + " failures in a row";
    }
  }
  return {code, std::move(message)};
}

bool PrefillPool::AnyUsable() const {
  return std::ranges::any_of(workers_, [this](const Worker& worker) {
    return worker.state == State::kReady && Usable(worker);
  });
}

}  // namespace kvrelay::agent
