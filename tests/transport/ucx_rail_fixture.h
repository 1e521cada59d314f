// What the tests of a UCX rail share: streams from an owner in another process.
#pragma once

#include <chrono>
#include <cstdint>
#include <functional>
#include <sstream>
#include <string>

#include "tests/transport/owner_fixture.h"

namespace kvrelay::transport {

using std::chrono::milliseconds;
using std::chrono::seconds;

class UcxRailTest : public OwnerTest {
 protected:
  static constexpr uint64_t kKvBytes = 16 << 20;
  static constexpr uint64_t kChunk = 256 << 10;
  static constexpr uint32_t kAllChunks = kKvBytes / kChunk;

  UcxRailTest() : OwnerTest("ucx-rail", kKvBytes) {}

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
  static std::string SendLine(const Node& reader, StreamId stream, uint32_t chunks,
                              int timeout_ms = 20000) {
    std::ostringstream line;
    line << "send " << ToText(reader.Spec("")) << ' ' << stream << ' ' << chunks << ' ' << kChunk
         << " 0 " << timeout_ms;
    return line.str();
  }
};

}  // namespace kvrelay::transport
