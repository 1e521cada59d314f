// What the tests of a UCX rail share: an owner in another process, and streams from it.
#pragma once

#include <gtest/gtest.h>

#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <sstream>
#include <string>
#include <vector>

#include "tests/transport/child.h"
#include "tests/transport/node.h"

namespace kvrelay::transport {

using std::chrono::milliseconds;
using std::chrono::seconds;

inline constexpr uint64_t kKvBytes = 16 << 20;
inline constexpr uint64_t kChunk = 256 << 10;
inline constexpr uint32_t kAllChunks = kKvBytes / kChunk;

class UcxRailTest : public testing::Test {
 protected:
  Completion Receive(Node& reader, PeerHandle peer, StreamId stream, uint32_t chunks,
                     const GuardExpectation& want, const std::function<void()>& then,
                     Duration timeout = seconds(20)) {
    return Receive(reader, peer, stream, ReceivePlan(chunks, kChunk), want, then, timeout);
  }
  Completion Receive(Node& reader, PeerHandle peer, StreamId stream, const StreamPlan& plan,
                     const GuardExpectation& want, const std::function<void()>& then,
                     Duration timeout = seconds(20)) {
    return reader.Await([&](Done done) {
      const OpId op = reader.transport().StartPackedReceive(peer, stream, plan, want, In(timeout),
                                                            std::move(done));
      then();
      return op;
    });
  }
  std::unique_ptr<Child> StartOwner(uint64_t seed) {
    auto child = std::make_unique<Child>(
        "owner",
        std::vector<std::string>{"ucx-rail", "", std::to_string(kKvBytes), std::to_string(seed)});
    const std::string line = child->Receive();
    EXPECT_EQ(line.substr(0, 6), "ready ");
    spec_ = FromText(line.substr(6));
    child->Send("start 0");
    EXPECT_EQ(child->Receive(), "ok");
    return child;
  }
  static std::string SendLine(const Node& reader, StreamId stream, uint32_t chunks,
                              int timeout_ms = 20000) {
    std::ostringstream line;
    line << "send " << ToText(reader.Spec("")) << ' ' << stream << ' ' << chunks << ' ' << kChunk
         << " 0 " << timeout_ms;
    return line.str();
  }
  static std::map<std::string, uint64_t> CountersOf(Node& node) {
    std::map<std::string, uint64_t> counters;
    for (const auto& [name, value] : node.transport().counters()) {
      counters[std::string(name)] = value;
    }
    return counters;
  }

  PeerSpec spec_;
};

}  // namespace kvrelay::transport
