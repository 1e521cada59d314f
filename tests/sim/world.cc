#include "tests/sim/world.h"

#include <algorithm>
#include <utility>
#include <vector>

namespace kvrelay::sim {

uint64_t Random::Next() {
  uint64_t z = (state_ += 0x9e3779b97f4a7c15ULL);
  z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9ULL;
  z = (z ^ (z >> 27)) * 0x94d049bb133111ebULL;
  return z ^ (z >> 31);
}

uint64_t World::Schedule(TimePoint when, std::function<void()> fn, uint64_t owner) {
  const uint64_t id = next_id_++;
  const TimePoint at = std::max(when, now_);
  events_.emplace(std::pair(at, id), Event{std::move(fn), owner});
  times_.emplace(id, at);
  return id;
}

void World::Cancel(uint64_t id) {
  const auto it = times_.find(id);
  if (it == times_.end()) return;
  // The closure goes last: what it holds may cancel events of its own.
  const auto event = events_.extract({it->second, id});
  times_.erase(it);
}

void World::DropAll(uint64_t owner) {
  std::vector<Event> dropped;
  for (auto it = events_.begin(); it != events_.end();) {
    if (it->second.owner != owner) {
      ++it;
      continue;
    }
    times_.erase(it->first.second);
    dropped.push_back(std::move(it->second));
    it = events_.erase(it);
  }
}

bool World::Run(TimePoint until, uint64_t max_events) {
  for (uint64_t n = 0; !events_.empty(); ++n) {
    if (n == max_events) return false;
    const auto first = events_.begin();
    if (first->first.first > until) break;
    now_ = first->first.first;
    const auto fn = std::move(first->second.fn);
    times_.erase(first->first.second);
    events_.erase(first);
    fn();
  }
  now_ = std::max(now_, until);
  return true;
}

}  // namespace kvrelay::sim
