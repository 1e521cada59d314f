// Virtual time, randomness and processes that crash: everything that a schedule's seed decides.
#pragma once

#include <cstdint>
#include <functional>
#include <map>
#include <utility>

#include "base/clock.h"

namespace kvrelay::sim {

// SplitMix64: quick to seed, which a hundred thousand schedules do.
class Random {
 public:
  explicit Random(uint64_t seed) : state_(seed) {}
  uint64_t Next();
  uint64_t Below(uint64_t n) { return Next() % n; }
  uint64_t Between(uint64_t low, uint64_t high) { return low + Below(high - low + 1); }
  bool Chance(double p) { return static_cast<double>(Next() >> 11) * 0x1p-53 < p; }

 private:
  uint64_t state_;
};

class World {
 public:
  explicit World(uint64_t seed) : random(seed) {}

  TimePoint Now() const { return now_; }
  // `owner` 0: nobody's, for example a message on its way.
  uint64_t Schedule(TimePoint when, std::function<void()> fn, uint64_t owner = 0);
  void Cancel(uint64_t id);
  // Drops everything that `owner` scheduled.
  void DropAll(uint64_t owner);
  uint64_t NewOwner() { return ++owners_; }
  // Runs events in order of time until there are none, or `until` is reached. False when more than
  // `max_events` ran.
  bool Run(TimePoint until, uint64_t max_events);
  bool idle() const { return events_.empty(); }

  Random random;

 private:
  TimePoint now_{};
  uint64_t next_id_ = 1;
  struct Event {
    std::function<void()> fn;
    uint64_t owner = 0;
  };
  uint64_t owners_ = 0;
  std::map<std::pair<TimePoint, uint64_t>, Event> events_;
  std::map<uint64_t, TimePoint> times_;
};

// One process. Its timers end with it; a restart is another Process.
class Process final : public Clock {
 public:
  explicit Process(World& world) : world_(world), id_(world.NewOwner()) {}
  ~Process() override { Kill(); }

  // What it scheduled does not run any more.
  void Kill() { world_.DropAll(id_); }

  TimePoint Now() const override { return world_.Now(); }
  TimerId CallAt(TimePoint when, std::function<void()> fn) override {
    return world_.Schedule(when, std::move(fn), id_);
  }
  void Cancel(TimerId id) override { world_.Cancel(id); }

 private:
  World& world_;
  const uint64_t id_;
};

}  // namespace kvrelay::sim
