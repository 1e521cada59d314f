// Two processes that share a host but neither network, nor mounts, nor shared memory, as two
// containers do. Needs root and the ip command; skipped without.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cstdlib>
#include <fstream>
#include <iostream>
#include <memory>
#include <sstream>
#include <string>

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
  static std::string Number(uint64_t n) { return std::to_string(n); }

  // Starts a node of `path` in namespaces of its own.
  static std::unique_ptr<Child> Isolate(const std::string& path, const std::string& run_dir,
                                        uint64_t seed, const std::string& interface) {
    return std::make_unique<Child>(
        "isolated", std::vector<std::string>{"owner", path, run_dir, Number(kKvBytes), Number(seed),
                                             interface});
  }
  // Bytes that the process has received over an interface of its own.
  static uint64_t ReceivedBytes(pid_t pid, const std::string& interface) {
    std::ifstream file("/proc/" + std::to_string(pid) + "/net/dev");
    for (std::string line; std::getline(file, line);) {
      const size_t at = line.find(interface + ":");
      if (at == std::string::npos) continue;
      std::istringstream in(line.substr(at + interface.size() + 1));
      uint64_t bytes = 0;
      in >> bytes;
      return bytes;
    }
    return 0;
  }
  // Joins the two by a cable; false when this machine does not let us.
  static bool Join(Child& a, Child& b) {
    if (a.Receive() != "isolated" || b.Receive() != "isolated") return false;
    const std::string commands =
        "ip link add kvtest0 type veth peer name kvtest1 2>/dev/null && ip link set kvtest0 "
        "netns " +
        std::to_string(a.pid()) + " && ip link set kvtest1 netns " + std::to_string(b.pid());
    if (std::system(commands.c_str()) != 0) return false;
    a.Send("go kvtest0 10.213.7.1");
    b.Send("go kvtest1 10.213.7.2");
    return true;
  }
  static std::string SpecOf(Child& child) {
    const std::string line = child.Receive();
    EXPECT_THAT(line, StartsWith("ready "));
    return line.substr(std::min<size_t>(line.size(), 6));
  }
};

TEST_F(NamespacesTest, StreamsCrossTheNetworkBetweenThem) {
  const auto owner = Isolate("ucx-packed", "", 3, "kvtest0");
  const auto reader = Isolate("ucx-packed", "", 4, "kvtest1");
  if (!Join(*owner, *reader)) GTEST_SKIP() << "no right to make namespaces here";
  const std::string owner_spec = SpecOf(*owner);
  const std::string reader_spec = SpecOf(*reader);
  owner->Send("start 0");
  ASSERT_EQ(owner->Receive(), "ok");
  reader->Send("connect " + owner_spec);
  ASSERT_EQ(reader->Receive(), "connected kOk ");
  const uint64_t before = ReceivedBytes(reader->pid(), "kvtest1");
  const uint64_t chunks = kKvBytes / kChunk;
  reader->Send("receive 1 " + Number(chunks) + " " + Number(kChunk) + " 3 0");
  ASSERT_EQ(reader->Receive(), "receiving");
  owner->Send("send " + reader_spec + " 1 " + Number(chunks) + " " + Number(kChunk) + " 0 20000");
  const std::string received = reader->Receive();
  EXPECT_THAT(received, StartsWith("received kOk right "));
  std::cout << kKvBytes << " bytes: " << received << " ms\n";
  // Nothing took a way around the cable.
  EXPECT_GE(ReceivedBytes(reader->pid(), "kvtest1") - before, kKvBytes);
}

TEST_F(NamespacesTest, LoopbacksThatAreNotTheSameAreNoticedOnConnect) {
  const auto owner = Isolate("ucx-packed", "", 3, "lo");
  const auto reader = Isolate("ucx-packed", "", 4, "lo");
  if (!Join(*owner, *reader)) GTEST_SKIP() << "no right to make namespaces here";
  const std::string owner_spec = SpecOf(*owner);
  SpecOf(*reader);
  reader->Send("connect " + owner_spec);
  const std::string answer = reader->Receive();
  EXPECT_THAT(answer, testing::AnyOf(StartsWith("connected kDeadlineExceeded"),
                                     StartsWith("connected kPeerUnreachable")));
  std::cout << answer << '\n';
}

TEST_F(NamespacesTest, MappedSaysThatThereIsNoSharedFolder) {
  const auto owner = Isolate("mapped", "/run/kvrelay-test", 3, "");
  const auto reader = Isolate("mapped", "/run/kvrelay-test-2", 4, "");
  if (!Join(*owner, *reader)) GTEST_SKIP() << "no right to make namespaces here";
  const std::string owner_spec = SpecOf(*owner);
  SpecOf(*reader);
  reader->Send("connect " + owner_spec);
  EXPECT_THAT(reader->Receive(),
              HasSubstr("no shared socket folder: /run/kvrelay-test does not exist here"));
}

}  // namespace
}  // namespace kvrelay::transport
