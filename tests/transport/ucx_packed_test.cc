#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <ucp/api/ucp.h>

#include <csignal>
#include <cstring>
#include <fstream>
#include <map>
#include <sstream>
#include <string>

#include "tests/transport/child.h"
#include "tests/transport/node.h"
#include "transport/packed_wire.h"
#include "transport/ucx_endpoint.h"
#include "transport/ucx_version.h"
#include "transport/ucx_worker.h"

namespace kvrelay::transport {
namespace {

using std::chrono::milliseconds;
using std::chrono::seconds;
using testing::HasSubstr;

constexpr uint64_t kKvBytes = 32 << 20;
constexpr uint64_t kChunk = 256 << 10;
constexpr uint32_t kAllChunks = kKvBytes / kChunk;

class UcxPackedTest : public testing::Test {
 protected:
  Completion Receive(Node& reader, PeerHandle peer, StreamId stream, uint32_t chunks,
                     const GuardExpectation& want, const std::function<void()>& then,
                     Duration timeout = seconds(20)) {
    return reader.Await([&](Done done) {
      const OpId op = reader.transport().StartPackedReceive(
          peer, stream, ReceivePlan(chunks, kChunk), want, In(timeout), std::move(done));
      then();
      return op;
    });
  }
  std::unique_ptr<Child> StartOwner(uint64_t seed) {
    auto child = std::make_unique<Child>(
        "owner", std::vector<std::string>{"ucx-packed", "", std::to_string(kKvBytes),
                                          std::to_string(seed)});
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
  static std::map<std::string, uint64_t> CountersOf(const Node& node) {
    std::map<std::string, uint64_t> counters;
    for (const auto& [name, value] : const_cast<Node&>(node).transport().counters()) {
      counters[std::string(name)] = value;
    }
    return counters;
  }

  PeerSpec spec_;
};

TEST_F(UcxPackedTest, StreamsFromAnotherProcess) {
  const auto owner = StartOwner(3);
  Node reader("ucx-packed", "", kKvBytes);
  const auto peer = reader.Connect(spec_);
  ASSERT_TRUE(peer.has_value()) << peer.error().ToString();
  for (const uint32_t chunks : {1U, 2U, 7U, kAllChunks}) {
    std::memset(reader.kv(), 0, kKvBytes);
    const Completion done =
        Receive(reader, *peer, 100 + chunks, chunks, Lease(spec_, 0),
                [&] { owner->Send(SendLine(reader, 100 + chunks, chunks)); });
    ASSERT_TRUE(done.status.ok()) << done.status.ToString();
    EXPECT_EQ(done.bytes, chunks * kChunk);
    EXPECT_TRUE(GuardHolds(Lease(spec_, 0), done.before, done.after));
    EXPECT_EQ(reader.FirstWrong(3, chunks * kChunk), std::nullopt);
    EXPECT_EQ(owner->Receive(), "sent kOk");
  }
}

}  // namespace
}  // namespace kvrelay::transport
