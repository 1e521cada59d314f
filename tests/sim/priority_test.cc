// A request's priority, from the decode engine's fetch to the terms on which the transports of both
// engines move its KV: the real agents, on virtual time.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <deque>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "tests/sim/sim_decode.h"
#include "tests/sim/sim_prefill.h"
#include "transport/throttle.h"

namespace kvrelay::sim {
namespace {

struct PriorityCase {
  Priority priority = Priority::kDecode;
  bool mapped = true;
};

// One prefill engine of two ranks, and decode engines.
class Engines {
 public:
  Engines(uint64_t seed, bool mapped) : world(seed), mapped_(mapped) {}

  SimDecode& Decode(Priority priority, Outcomes& outcomes) {
    return decodes_.emplace_back(
        host,
        SimDecode::Options{.engine = MakeEngineId(2 + decodes_.size()),
                           .prefix = "d" + std::to_string(decodes_.size()) + ":",
                           .mapped = mapped_,
                           .prefills = {prefill().endpoint()},
                           .request_timeout = Millis(60'000),
                           .priority = priority},
        outcomes);
  }
  SimPrefill& prefill() {
    if (!prefill_) {
      prefill_.emplace(host,
                       SimPrefill::Options{.engine = MakeEngineId(1),
                                           .prefix = "p:",
                                           .tp = 2,
                                           .mapped = mapped_,
                                           .ttl = Millis(60'000),
                                           .cap = Millis(120'000),
                                           .on_ticket = [](const Prompt&, const proto::Ticket&) {},
                                           .on_finished = [](const proto::Ticket&) {}},
                       nullptr);
    }
    return *prefill_;
  }

  World world;
  Network network{world};
  transport::FakeFabric fabric{[this] { return world.random.Next(); }};
  Host host{.world = world, .network = network, .fabric = fabric, .graveyard = {}, .violation = {}};

 private:
  const bool mapped_;
  std::optional<SimPrefill> prefill_;
  std::deque<SimDecode> decodes_;
};

class PriorityOf : public testing::TestWithParam<PriorityCase> {};

TEST_P(PriorityOf, ReachesEveryOperationOfThePull) {
  const auto [priority, mapped] = GetParam();
  Engines engines(1, mapped);
  std::vector<transport::Terms> terms;
  engines.fabric.on_start = [&terms](const transport::Terms& started) { terms.push_back(started); };
  Outcomes outcomes;
  SimDecode& decode = engines.Decode(priority, outcomes);
  const Prompt prompt{.prefix = 2, .prefix_tokens = 2 * kBlockSize, .own = 2, .own_tokens = 5};
  decode.Request(prompt, Millis(60'000), Duration{});
  ASSERT_TRUE(engines.world.Run(TimePoint(Millis(10'000)), 1'000'000));
  ASSERT_EQ(engines.host.violation, "");
  ASSERT_EQ(outcomes.served, 1U) << outcomes.last_failure;
  // Of the request's own tokens and of the prefix, which others may wait for, from two ranks each;
  // both sides of a packed stream have terms.
  const size_t each = mapped ? 2 : 4;
  EXPECT_EQ(terms.size(), 2 * each);
  std::map<uint64_t, std::vector<Priority>> sessions;
  for (const transport::Terms& one : terms) sessions[one.session].push_back(one.priority);
  std::vector<std::vector<Priority>> pulls;
  for (auto& [session, priorities] : sessions) pulls.push_back(std::move(priorities));
  EXPECT_THAT(pulls, testing::UnorderedElementsAre(std::vector<Priority>(each, priority),
                                                   std::vector<Priority>(each, Priority::kDecode)));
}

INSTANTIATE_TEST_SUITE_P(Both, PriorityOf,
                         testing::Values(PriorityCase{Priority::kDecode, true},
                                         PriorityCase{Priority::kPrefetch, true},
                                         PriorityCase{Priority::kDecode, false},
                                         PriorityCase{Priority::kPrefetch, false}),
                         [](const auto& test) {
                           return std::string(PriorityName(test.param.priority)) +
                                  (test.param.mapped ? "Mapped" : "Packed");
                         });

// A link that moves 1,000 bytes a second, and prompts of 320 that take a third of a second each. On
// it are prefetches, when requests come for whose tokens users wait.
class Contention : public testing::TestWithParam<bool> {};

TEST_P(Contention, WhatUsersWaitForIsServedFirstThoughItCameLast) {
  for (uint64_t seed = 1; seed <= 5; ++seed) {
    SCOPED_TRACE("seed " + std::to_string(seed));
    Engines engines(seed, GetParam());
    engines.fabric.script.in_turn = true;
    engines.host.throttle =
        std::make_shared<transport::Throttle>(transport::Caps{.bytes_per_s = 1000});
    Outcomes prefetched;
    Outcomes decoded;
    SimDecode& prefetch = engines.Decode(Priority::kPrefetch, prefetched);
    SimDecode& decode = engines.Decode(Priority::kDecode, decoded);
    auto request = [next = uint64_t{0}](SimDecode& engine) mutable {
      engine.Request({.prefix = 0, .prefix_tokens = 0, .own = ++next, .own_tokens = 5},
                     Millis(60'000), Duration{});
    };
    const auto run_for = [&](Duration time) {
      ASSERT_TRUE(engines.world.Run(engines.world.Now() + time, 10'000'000));
    };
    const auto moved = [&] { return engines.host.throttle->counts().moved_bytes; };
    for (int i = 0; i < 3; ++i) request(prefetch);
    while (moved() == 0) run_for(Millis(1));
    for (int i = 0; i < 2; ++i) request(decode);
    uint64_t moved_by_then = 0;
    while (decoded.served < 2) {
      ASSERT_EQ(prefetched.served, 0U);
      ASSERT_EQ(decoded.failed + prefetched.failed, 0U)
          << decoded.last_failure << prefetched.last_failure;
      run_for(Millis(1));
      moved_by_then = moved();
    }
    // All their own, and of the prefetches what had moved when they were not there yet.
    EXPECT_LT(moved_by_then, 3 * 320U);
    while (prefetched.served < 3 && prefetched.failed == 0) run_for(Millis(1));
    EXPECT_EQ(prefetched.served, 3U) << prefetched.last_failure;
    EXPECT_EQ(moved(), 5 * 320U);
    EXPECT_EQ(engines.host.violation, "");
  }
}

INSTANTIATE_TEST_SUITE_P(Both, Contention, testing::Values(true, false),
                         [](const auto& test) { return test.param ? "Mapped" : "Packed"; });

}  // namespace
}  // namespace kvrelay::sim
