#include "tests/transport/owner_fixture.h"

#include <vector>

namespace kvrelay::transport {

CopyPlan Endless() {
  CopyPlan plan = Contiguous(0, 4 << 20);
  plan.segments.assign(100'000, {0, 0});
  plan.boxes[0].num_segments = static_cast<uint32_t>(plan.segments.size());
  return plan;
}

std::map<std::string, uint64_t> CountersOf(Node& node) {
  std::map<std::string, uint64_t> counters;
  for (const auto& [name, value] : node.transport().counters()) {
    counters[std::string(name)] = value;
  }
  return counters;
}

std::unique_ptr<Child> OwnerTest::StartOwner(uint64_t seed) {
  auto child = std::make_unique<Child>(
      "owner", std::vector<std::string>{path_, dir_.path(), std::to_string(kv_bytes_),
                                        std::to_string(seed)});
  const std::string line = child->Receive();
  EXPECT_EQ(line.substr(0, 6), "ready ");
  spec_ = FromText(line.substr(6));
  child->Send("start 0");
  EXPECT_EQ(child->Receive(), "ok");
  return child;
}

Completion OwnerTest::Read(Node& reader, PeerHandle peer, NextPortion next, GuardRef guard,
                           Duration timeout) {
  return reader.Await([&](Done done) {
    return reader.transport().Read(peer, std::move(next), guard, In(timeout), std::move(done));
  });
}

std::string OwnerTest::WhyNot(Node& reader, const PeerSpec& spec, Duration timeout) {
  const auto peer = reader.Connect(
      spec, [] {}, timeout);
  return peer.has_value() ? "connected" : peer.error().ToString();
}

}  // namespace kvrelay::transport
