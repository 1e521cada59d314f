// Two processes that share a host but neither network, nor mounts, nor shared memory, as two
// containers do. Needs root and the ip command; skipped without.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cstdlib>
#include <iostream>
#include <memory>
#include <string>

#include "tests/common/cable.h"
#include "tests/common/isolated_host.h"
#include "tests/common/slowness.h"
#include "tests/transport/child.h"
#include "tests/transport/node.h"

namespace kvrelay::transport {
namespace {

using testing::HasSubstr;
using testing::StartsWith;

class NamespacesTest : public testing::Test {
 protected:
  static constexpr uint64_t kKvBytes = 32 << 20;
  static constexpr uint64_t kChunk = 256 << 10;

  void SetUp() override {
    first_ = IsolatedHost::Create();
    second_ = IsolatedHost::Create();
    if (!first_ || !second_ || !Connect()) {
      GTEST_SKIP() << "no right to make namespaces or interfaces here, or no ip or nsenter command";
    }
  }
  virtual bool Connect() { return first_->Join(*second_); }

  static std::string Number(uint64_t n) { return std::to_string(n); }
  // Starts a node of `path` there.
  static std::unique_ptr<Child> Start(const IsolatedHost& host, const std::string& path,
                                      const std::string& run_dir, uint64_t kv_bytes, uint64_t seed,
                                      const std::string& interface) {
    return std::make_unique<Child>(
        "there", std::vector<std::string>{Number(static_cast<uint64_t>(host.pid())), "owner", path,
                                          run_dir, Number(kv_bytes), Number(seed), interface});
  }
  static std::string SpecOf(Child& child) {
    const std::string line = child.Receive();
    EXPECT_THAT(line, StartsWith("ready "));
    return line.substr(std::min<size_t>(line.size(), 6));
  }
  double Stream(uint64_t bytes);
  double PlainTcp(uint64_t bytes);

  std::unique_ptr<IsolatedHost> first_;
  std::unique_ptr<IsolatedHost> second_;
};

// Sends `bytes` over the network between them, and checks that nothing took a way around the cable.
// Milliseconds from the reader's call to its completion; a test failure when it did not go well.
double NamespacesTest::Stream(uint64_t bytes) {
  const auto owner = Start(*first_, "ucx-packed", "", bytes, 3, "kvtest0");
  const auto reader = Start(*second_, "ucx-packed", "", bytes, 4, "kvtest1");
  const std::string owner_spec = SpecOf(*owner);
  const std::string reader_spec = SpecOf(*reader);
  owner->Send("start 0");
  EXPECT_EQ(owner->Receive(), "ok");
  reader->Send("connect " + owner_spec);
  EXPECT_EQ(reader->Receive(), "connected kOk ");
  const uint64_t before = second_->ReceivedBytes("kvtest1");
  const uint64_t chunks = bytes / kChunk;
  reader->Send("receive 1 " + Number(chunks) + " " + Number(kChunk) + " 3 0");
  EXPECT_EQ(reader->Receive(), "receiving");
  owner->Send("send " + reader_spec + " 1 " + Number(chunks) + " " + Number(kChunk) + " 0 20000");
  const std::string received = reader->Receive();
  EXPECT_THAT(received, StartsWith("received kOk right "));
  EXPECT_GE(second_->ReceivedBytes("kvtest1") - before, bytes);
  return std::strtod(received.substr(received.rfind(' ') + 1).c_str(), nullptr);
}

// The same bytes over a socket of the kernel's.
double NamespacesTest::PlainTcp(uint64_t bytes) {
  const auto there = [](const IsolatedHost& host, const std::vector<std::string>& command) {
    std::vector<std::string> line = {Number(static_cast<uint64_t>(host.pid()))};
    line.insert(line.end(), command.begin(), command.end());
    return std::make_unique<Child>("there", line);
  };
  const std::string ip = IsolatedHost::kLeftAddress;
  const auto sender = there(*first_, {"tcp-sender", ip, Number(bytes)});
  const std::string port = SpecOf(*sender);
  const std::string received =
      there(*second_, {"tcp-receiver", ip, port, Number(bytes)})->Receive();
  EXPECT_THAT(received, StartsWith("received "));
  return std::strtod(received.substr(received.rfind(' ') + 1).c_str(), nullptr);
}

TEST_F(NamespacesTest, StreamsCrossTheNetworkBetweenThem) {
  std::cout << kKvBytes << " bytes: " << Stream(kKvBytes) << " ms\n";
}

class LongCableTest : public NamespacesTest {
 protected:
  static constexpr uint64_t kMbit = 1000;
  bool Connect() override {
    cable_ = Cable::Lay(*first_, *second_, {.delay = Millis(1), .mbit_per_second = kMbit});
    return cable_ != nullptr;
  }

  std::unique_ptr<Cable> cable_;
};

// 1 Gbit/s, 2 ms there and back, headers and the start included. Where a process carries the frames
// it may lack the processor to do so: there the cable is what a plain socket gets through it.
TEST_F(LongCableTest, AStreamFillsIt) {
  constexpr uint64_t kBytes = uint64_t{64} << 20;
  const auto part = [](double ms) { return static_cast<double>(kBytes) * 8e-3 / ms / kMbit; };
  const bool carried = cable_->kind() != std::string("netem");
  double filled = 0;
  for (int attempt = 0; attempt < 6 && filled < 0.85; ++attempt) {
    const double stream = part(Stream(kBytes));
    const double cable = carried ? part(PlainTcp(kBytes)) : 1;
    std::cout << "of 1 Gbit/s: " << stream << (carried ? ", plain TCP " : ", the cable ") << cable
              << '\n';
    EXPECT_LT(stream, 1) << "faster than the cable";
    filled = std::max(filled, stream / cable);
  }
  EXPECT_GE(filled, 0.85);
}

TEST_F(NamespacesTest, LoopbacksThatAreNotTheSameAreNoticedOnConnect) {
  const auto owner = Start(*first_, "ucx-packed", "", kKvBytes, 3, "lo");
  const auto reader = Start(*second_, "ucx-packed", "", kKvBytes, 4, "lo");
  const std::string owner_spec = SpecOf(*owner);
  SpecOf(*reader);
  reader->Send("connect " + owner_spec);
  const std::string answer = reader->Receive();
  EXPECT_THAT(answer, testing::AnyOf(StartsWith("connected kDeadlineExceeded"),
                                     StartsWith("connected kPeerUnreachable")));
  std::cout << answer << '\n';
}

TEST_F(NamespacesTest, MappedSaysThatThereIsNoSharedFolder) {
  const auto owner = Start(*first_, "mapped", "/run/kvrelay-test", kKvBytes, 3, "");
  const auto reader = Start(*second_, "mapped", "/run/kvrelay-test-2", kKvBytes, 4, "");
  const std::string owner_spec = SpecOf(*owner);
  SpecOf(*reader);
  reader->Send("connect " + owner_spec);
  EXPECT_THAT(reader->Receive(),
              HasSubstr("no shared socket folder: /run/kvrelay-test does not exist here"));
}

}  // namespace
}  // namespace kvrelay::transport
