// A request's priority, from the decode engine's fetch to the terms on which the transports of both
// engines move its KV: the real agents, on virtual time.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <map>
#include <memory>
#include <string>
#include <vector>

#include "tests/sim/sim_decode.h"
#include "tests/sim/sim_prefill.h"

namespace kvrelay::sim {
namespace {

struct PriorityCase {
  Priority priority = Priority::kDecode;
  bool mapped = true;
};

class PriorityOf : public testing::TestWithParam<PriorityCase> {};

TEST_P(PriorityOf, ReachesEveryOperationOfThePull) {
  const auto [priority, mapped] = GetParam();
  World world(1);
  Network network(world);
  transport::FakeFabric fabric([&world] { return world.random.Next(); });
  std::vector<transport::Terms> terms;
  fabric.on_start = [&terms](const transport::Terms& started) { terms.push_back(started); };
  Host host{.world = world, .network = network, .fabric = fabric, .graveyard = {}, .violation = {}};
  SimPrefill prefill(host,
                     {.engine = MakeEngineId(1),
                      .prefix = "p:",
                      .tp = 2,
                      .mapped = mapped,
                      .on_ticket = [](const Prompt&, const proto::Ticket&) {},
                      .on_finished = [](const proto::Ticket&) {}},
                     nullptr);
  Outcomes outcomes;
  SimDecode decode(host,
                   {.engine = MakeEngineId(2),
                    .prefix = "d:",
                    .mapped = mapped,
                    .prefills = {prefill.endpoint()},
                    .priority = priority},
                   outcomes);
  const Prompt prompt{.prefix = 1, .prefix_tokens = 2 * kBlockSize, .own = 2, .own_tokens = 5};
  decode.Request(prompt, Millis(60'000), Duration{});
  ASSERT_TRUE(world.Run(TimePoint(Millis(10'000)), 1'000'000));
  ASSERT_EQ(host.violation, "");
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

}  // namespace
}  // namespace kvrelay::sim
