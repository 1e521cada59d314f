// Two processes that share a host but neither network, nor mounts, nor shared memory, as two
// containers do. Needs root and the ip command; skipped without.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <iostream>
#include <memory>
#include <string>

#include "tests/common/isolated_host.h"
#include "tests/transport/child.h"
#include "tests/transport/node.h"

namespace kvrelay::transport {
namespace {

using testing::HasSubstr;
using testing::StartsWith;

constexpr uint64_t kKvBytes = 32 << 20;
constexpr uint64_t kChunk = 256 << 10;

class NamespacesTest : public testing::Test {
 protected:
  void SetUp() override {
    first_ = IsolatedHost::Create();
    second_ = IsolatedHost::Create();
    if (!first_ || !second_ || !first_->Join(*second_)) {
      GTEST_SKIP() << "no right to make namespaces here, or no ip or nsenter command";
    }
  }

  static std::string Number(uint64_t n) { return std::to_string(n); }
  // Starts a node of `path` there.
  static std::unique_ptr<Child> Start(const IsolatedHost& host, const std::string& path,
                                      const std::string& run_dir, uint64_t seed,
                                      const std::string& interface) {
    return std::make_unique<Child>(
        "there", std::vector<std::string>{Number(static_cast<uint64_t>(host.pid())), "owner", path,
                                          run_dir, Number(kKvBytes), Number(seed), interface});
  }
  static std::string SpecOf(Child& child) {
    const std::string line = child.Receive();
    EXPECT_THAT(line, StartsWith("ready "));
    return line.substr(std::min<size_t>(line.size(), 6));
  }

  std::unique_ptr<IsolatedHost> first_;
  std::unique_ptr<IsolatedHost> second_;
};

TEST_F(NamespacesTest, StreamsCrossTheNetworkBetweenThem) {
  const auto owner = Start(*first_, "ucx-packed", "", 3, "kvtest0");
  const auto reader = Start(*second_, "ucx-packed", "", 4, "kvtest1");
  const std::string owner_spec = SpecOf(*owner);
  const std::string reader_spec = SpecOf(*reader);
  owner->Send("start 0");
  ASSERT_EQ(owner->Receive(), "ok");
  reader->Send("connect " + owner_spec);
  ASSERT_EQ(reader->Receive(), "connected kOk ");
  const uint64_t before = second_->ReceivedBytes("kvtest1");
  const uint64_t chunks = kKvBytes / kChunk;
  reader->Send("receive 1 " + Number(chunks) + " " + Number(kChunk) + " 3 0");
  ASSERT_EQ(reader->Receive(), "receiving");
  owner->Send("send " + reader_spec + " 1 " + Number(chunks) + " " + Number(kChunk) + " 0 20000");
  const std::string received = reader->Receive();
  EXPECT_THAT(received, StartsWith("received kOk right "));
  std::cout << kKvBytes << " bytes: " << received << " ms\n";
  // Nothing took a way around the cable.
  EXPECT_GE(second_->ReceivedBytes("kvtest1") - before, kKvBytes);
}

TEST_F(NamespacesTest, LoopbacksThatAreNotTheSameAreNoticedOnConnect) {
  const auto owner = Start(*first_, "ucx-packed", "", 3, "lo");
  const auto reader = Start(*second_, "ucx-packed", "", 4, "lo");
  const std::string owner_spec = SpecOf(*owner);
  SpecOf(*reader);
  reader->Send("connect " + owner_spec);
  const std::string answer = reader->Receive();
  EXPECT_THAT(answer, testing::AnyOf(StartsWith("connected kDeadlineExceeded"),
                                     StartsWith("connected kPeerUnreachable")));
  std::cout << answer << '\n';
}

TEST_F(NamespacesTest, MappedSaysThatThereIsNoSharedFolder) {
  const auto owner = Start(*first_, "mapped", "/run/kvrelay-test", 3, "");
  const auto reader = Start(*second_, "mapped", "/run/kvrelay-test-2", 4, "");
  const std::string owner_spec = SpecOf(*owner);
  SpecOf(*reader);
  reader->Send("connect " + owner_spec);
  EXPECT_THAT(reader->Receive(),
              HasSubstr("no shared socket folder: /run/kvrelay-test does not exist here"));
}

}  // namespace
}  // namespace kvrelay::transport
