#include <fcntl.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <sys/stat.h>

#include <cstring>
#include <filesystem>
#include <fstream>
#include <functional>
#include <optional>
#include <string>
#include <vector>

#include "tests/transport/owner_fixture.h"
#include "transport/mapped_address.h"
#include "transport/mapped_wire.h"
#include "transport/unix_socket.h"

namespace kvrelay::transport {
namespace {

using std::chrono::milliseconds;
using std::chrono::seconds;
using testing::HasSubstr;

size_t OpenDescriptors() {
  return static_cast<size_t>(std::distance(std::filesystem::directory_iterator("/proc/self/fd"),
                                           std::filesystem::directory_iterator()));
}

class MappedConnectTest : public OwnerTest {
 protected:
  static constexpr uint64_t kKvBytes = 8 << 20;

  MappedConnectTest() : OwnerTest("mapped", kKvBytes) {}
};

TEST_F(MappedConnectTest, SaysWhyAnOwnerCannotBeMapped) {
  Node reader("mapped", dir_.path(), kKvBytes);
  const auto owner = StartOwner(1);
  const auto address = MappedAddress::Decode(spec_.address);
  ASSERT_TRUE(address.has_value());
  const auto with = [&](const std::function<void(MappedAddress&)>& change) {
    MappedAddress changed = *address;
    change(changed);
    PeerSpec spec = spec_;
    spec.address = changed.Encode();
    return WhyNot(reader, spec);
  };
  EXPECT_EQ(with([](MappedAddress&) {}), "connected");
  EXPECT_THAT(with([](MappedAddress& a) { a.socket_path = "/run/nowhere/x.sock"; }),
              HasSubstr("no shared socket folder: /run/nowhere does not exist here"));
  EXPECT_THAT(with([](MappedAddress& a) { a.socket_path += "x"; }), HasSubstr("no shared socket"));
  EXPECT_THAT(with([](MappedAddress& a) { a.host.host_id = "other"; }), HasSubstr("another host"));
  EXPECT_THAT(with([](MappedAddress& a) { a.host.uid += 1; }), HasSubstr("another user"));
  EXPECT_THAT(with([](MappedAddress& a) { a.nonce += 1; }), HasSubstr("closed the socket"));
  EXPECT_THAT(with([](MappedAddress& a) { a.socket_path = "/" + std::string(200, 'x'); }),
              HasSubstr("characters"));
  PeerSpec garbage = spec_;
  garbage.address = "garbage";
  EXPECT_THAT(WhyNot(reader, garbage), HasSubstr("kInvalidArgument"));
  PeerSpec restarted = spec_;
  restarted.incarnation += 1;
  EXPECT_THAT(WhyNot(reader, restarted), HasSubstr("another incarnation"));
  PeerSpec fewer = spec_;
  fewer.region_bytes.pop_back();
  EXPECT_THAT(WhyNot(reader, fewer), HasSubstr("offers 2 regions, its description names 1"));
  PeerSpec longer = spec_;
  longer.region_bytes[0] += 4096;
  EXPECT_THAT(WhyNot(reader, longer), HasSubstr("region 0"));
  owner->KillAndWait();
  EXPECT_THAT(WhyNot(reader, spec_), HasSubstr("nobody listens"));
}

TEST_F(MappedConnectTest, OwnerThatAcceptsAndSaysNothingCostsADeadline) {
  Node reader("mapped", dir_.path(), kKvBytes);
  const std::string path = dir_.path() + "/silent.sock";
  const auto silent = ListenUnix(path);
  ASSERT_TRUE(silent.has_value()) << silent.error().ToString();
  PeerSpec spec{.name = "silent", .address = {}, .region_bytes = {4096}, .incarnation = 1};
  spec.address = MappedAddress{.host = *ThisHost(), .nonce = 1, .socket_path = path}.Encode();
  const TimePoint begin = In(seconds(0));
  EXPECT_THAT(WhyNot(reader, spec, milliseconds(100)), HasSubstr("kDeadlineExceeded"));
  EXPECT_LT(In(seconds(0)) - begin, seconds(2));
}

TEST_F(MappedConnectTest, MaliciousOwnerIsRefused) {
  Node reader("mapped", dir_.path(), kKvBytes);
  const std::string path = dir_.path() + "/bad.sock";
  const auto listener = ListenUnix(path);
  ASSERT_TRUE(listener.has_value());
  PeerSpec spec{.name = "bad", .address = {}, .region_bytes = {4096}, .incarnation = 1};
  spec.address = MappedAddress{.host = *ThisHost(), .nonce = 1, .socket_path = path}.Encode();
  mapped::RegionBatch unsealed{.total_regions = 1, .first_region = 0, .count = 1, .bytes = {4096}};
  mapped::RegionBatch beyond = unsealed;
  beyond.first_region = 1;
  mapped::RegionBatch without = unsealed;
  for (const auto& [batch, with_fd] :
       {std::pair{unsealed, true}, {beyond, true}, {without, false}}) {
    std::optional<Result<PeerHandle>> result;
    reader.transport().Connect(
        spec, In(seconds(5)), [&](Result<PeerHandle> r) { result = std::move(r); }, [] {});
    UniqueFd accepted;
    ASSERT_TRUE(reader.control().RunUntil([&] {
      if (!accepted) accepted = std::move(*AcceptUnix(listener->get()));
      return accepted.valid();
    }));
    // An ordinary file could be cut short under the reader, which would then die of SIGBUS.
    std::ofstream(dir_.path() + "/file") << std::string(4096, 'x');
    const UniqueFd file(open((dir_.path() + "/file").c_str(), O_RDONLY | O_CLOEXEC));
    const int fds[] = {file.get()};
    SendMessage(accepted.get(), std::as_bytes(std::span(&batch, 1)),
                with_fd ? std::span<const int>(fds) : std::span<const int>());
    ASSERT_TRUE(reader.control().RunUntil([&] { return result.has_value(); }));
    EXPECT_FALSE(result->has_value());
  }
}

TEST_F(MappedConnectTest, OwnerForgetsReadersThatEndOrMisbehave) {
  Node owner("mapped", dir_.path(), kKvBytes);
  const auto address = MappedAddress::Decode(owner.Spec("").address);
  ASSERT_TRUE(address.has_value());
  const size_t before = OpenDescriptors();
  {
    Child reader("reader", {"mapped", dir_.path(), ToText(owner.Spec(""))});
    ASSERT_EQ(reader.Receive(), "connected kOk");
    reader.KillAndWait();
  }
  for (const char* words : {"x", "not a hello, and longer than one"}) {
    const auto fd = ConnectUnix(address->socket_path);
    ASSERT_TRUE(fd.has_value());
    SendMessage(fd->get(), std::as_bytes(std::span(words, 1)), {});
    EXPECT_TRUE(owner.control().RunUntil([&] {
      size_t size = 0;
      std::byte buffer[8];
      std::vector<UniqueFd> fds;
      return ReceiveMessage(fd->get(), buffer, size, fds) == SocketState::kClosed;
    }));
  }
  EXPECT_TRUE(owner.control().RunUntil([&] { return OpenDescriptors() == before; }));
  // And serves the next one.
  Node reader("mapped", dir_.path(), kKvBytes);
  EXPECT_EQ(WhyNot(reader, owner.Spec("")), "connected");
}

TEST_F(MappedConnectTest, SilentReaderIsClosedAfterTwoSeconds) {
  Node owner("mapped", dir_.path(), kKvBytes);
  const auto fd = ConnectUnix(MappedAddress::Decode(owner.Spec("").address)->socket_path);
  ASSERT_TRUE(fd.has_value());
  const auto closed = [&] {
    size_t size = 0;
    std::byte buffer[8];
    std::vector<UniqueFd> fds;
    return ReceiveMessage(fd->get(), buffer, size, fds) == SocketState::kClosed;
  };
  EXPECT_FALSE(owner.control().RunUntil(closed, milliseconds(500)));
  EXPECT_TRUE(owner.control().RunUntil(closed, seconds(4)));
}

TEST_F(MappedConnectTest, SocketFolderIsPrivateAndSwept) {
  Options options;
  options.executor = [](auto) {};
  const auto region = Region::AllocateHost(4096, "kvrelay-test-kv");
  options.regions = {{region->data(), region->bytes(), region->export_fd()}};
  options.run_dir = dir_.path() + "/open";
  ASSERT_EQ(mkdir(options.run_dir.c_str(), 0755), 0);
  chmod(options.run_dir.c_str(), 0755);
  const auto refused = CreateMapped(options);
  ASSERT_FALSE(refused.has_value());
  EXPECT_THAT(refused.error().ToString(), HasSubstr("mode 0700"));

  // A killed process leaves its socket; the next one that starts takes it away, but leaves those of
  // the living.
  Node living("mapped", dir_.path(), 4096);
  const auto owner = StartOwner(1);
  const std::string dead_path = MappedAddress::Decode(spec_.address)->socket_path;
  owner->KillAndWait();
  EXPECT_TRUE(std::filesystem::exists(dead_path));
  Node next("mapped", dir_.path(), 4096);
  EXPECT_FALSE(std::filesystem::exists(dead_path));
  EXPECT_TRUE(std::filesystem::exists(MappedAddress::Decode(living.Spec("").address)->socket_path));
}

TEST_F(MappedConnectTest, ManyRegionsCrossInBatches) {
  constexpr size_t kRegions = 100;
  std::vector<Region> memory;
  Node reader("mapped", dir_.path(), kKvBytes);
  Control control;
  Options options;
  options.executor = control.executor();
  options.run_dir = dir_.path();
  options.incarnation = 9;
  PeerSpec spec{.name = "owner", .address = {}, .region_bytes = {}, .incarnation = 9};
  for (size_t i = 0; i < kRegions; ++i) {
    memory.push_back(*Region::AllocateHost(4096 * (1 + i % 3), "kvrelay-test-many"));
    std::memset(memory[i].data(), static_cast<int>(i), 4096);
    options.regions.push_back({memory[i].data(), memory[i].bytes(), memory[i].export_fd()});
    spec.region_bytes.push_back(memory[i].bytes());
  }
  const auto owner = CreateMapped(options);
  ASSERT_TRUE(owner.has_value()) << owner.error().ToString();
  spec.address = (*owner)->LocalAddress();
  const auto peer = reader.Connect(spec);
  ASSERT_TRUE(peer.has_value()) << peer.error().ToString();
  for (const RegionId id : {0U, 31U, 32U, 64U, 99U}) {
    CopyPlan plan = Contiguous(0, 4096);
    plan.places[0].src_region = id;
    ASSERT_TRUE(Read(reader, *peer, plan, {0, 0}).status.ok());
    EXPECT_EQ(reader.kv()[4095], static_cast<std::byte>(id));
  }
}

TEST(MappedAddressTest, DecodesOnlyWhatItEncodes) {
  const MappedAddress address{
      .host = {.host_id = "b", .uid = 1000}, .nonce = 5, .socket_path = "/run/a b/x.sock"};
  const auto again = MappedAddress::Decode(address.Encode());
  ASSERT_TRUE(again.has_value());
  EXPECT_EQ(again->socket_path, "/run/a b/x.sock");
  EXPECT_EQ(again->host.uid, 1000U);
  const std::string good = address.Encode();
  for (size_t i = 0; i < good.find('/'); ++i) {
    EXPECT_FALSE(MappedAddress::Decode(good.substr(0, i)).has_value()) << i;
  }
  EXPECT_FALSE(MappedAddress::Decode("kvrelay-mapped-1 b 1000 x /a").has_value());
  EXPECT_FALSE(MappedAddress::Decode("kvrelay-mapped-1 b -1 5 /a").has_value());
  EXPECT_FALSE(MappedAddress::Decode("kvrelay-mapped-1 b 1 5 a").has_value());
  EXPECT_FALSE(MappedAddress::Decode(good + std::string(1000, 'x')).has_value());
}

}  // namespace
}  // namespace kvrelay::transport
