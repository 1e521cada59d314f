#include <fcntl.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <sys/stat.h>

#include <algorithm>
#include <atomic>
#include <csignal>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <optional>
#include <string>
#include <thread>

#include "tests/common/slowness.h"
#include "tests/transport/child.h"
#include "tests/transport/node.h"
#include "transport/mapped_address.h"
#include "transport/mapped_wire.h"
#include "transport/unix_socket.h"

namespace kvrelay::transport {
namespace {

using std::chrono::milliseconds;
using std::chrono::seconds;
using testing::HasSubstr;

constexpr uint64_t kKvBytes = 8 << 20;

// A copy of the same 4 MiB again and again: many gigabytes, which no deadline of these tests would
// ever see the end of.
CopyPlan Endless() {
  CopyPlan plan = Contiguous(0, 4 << 20);
  plan.segments.assign(1'000'000, {0, 0});
  plan.boxes[0].num_segments = static_cast<uint32_t>(plan.segments.size());
  return plan;
}

int TimesMapped(const std::string& name) {
  std::ifstream maps("/proc/self/maps");
  int times = 0;
  for (std::string line; std::getline(maps, line);) times += line.find(name) != std::string::npos;
  return times;
}

size_t OpenDescriptors() {
  return static_cast<size_t>(std::distance(std::filesystem::directory_iterator("/proc/self/fd"),
                                           std::filesystem::directory_iterator()));
}

class MappedTest : public testing::Test {
 protected:
  Completion Read(Node& reader, PeerHandle peer, const CopyPlan& plan, GuardRef guard,
                  Duration timeout = seconds(20)) {
    return reader.Await([&](Done done) {
      return reader.transport().Read(peer, Whole(plan), guard, In(timeout), std::move(done));
    });
  }
  // Starts an owner process; its first line is in `spec_`.
  std::unique_ptr<Child> StartOwner(uint64_t seed, uint64_t kv_bytes = kKvBytes) {
    auto child = std::make_unique<Child>(
        "owner", std::vector<std::string>{"mapped", dir_.path(), std::to_string(kv_bytes),
                                          std::to_string(seed)});
    const std::string line = child->Receive();
    EXPECT_EQ(line.substr(0, 6), "ready ");
    spec_ = FromText(line.substr(6));
    return child;
  }
  std::string WhyNot(Node& reader, const PeerSpec& spec, Duration timeout = seconds(5)) {
    const auto peer = reader.Connect(
        spec, [] {}, timeout);
    return peer.has_value() ? "connected" : peer.error().ToString();
  }

  TempDir dir_;
  PeerSpec spec_;
};

TEST_F(MappedTest, ReadsDataBetweenTwoReadsOfTheGuard) {
  Node owner("mapped", dir_.path(), kKvBytes);
  Node reader("mapped", dir_.path(), kKvBytes);
  owner.Fill(1);
  owner.StartLease(3);
  const auto peer = reader.Connect(owner.Spec("owner"));
  ASSERT_TRUE(peer.has_value()) << peer.error().ToString();

  const Completion done = Read(reader, *peer, Contiguous(0, kKvBytes), Node::guard(3));
  ASSERT_TRUE(done.status.ok()) << done.status.ToString();
  EXPECT_EQ(done.bytes, kKvBytes);
  EXPECT_TRUE(GuardHolds(Lease(owner.Spec(""), 3), done.before, done.after));
  EXPECT_EQ(reader.FirstWrong(1, kKvBytes), std::nullopt);

  // The lease ends: the bytes may be anything now, and the words say so.
  owner.record(3)->End();
  const Completion late = Read(reader, *peer, Contiguous(0, 64), Node::guard(3));
  ASSERT_TRUE(late.status.ok());
  EXPECT_FALSE(GuardHolds(Lease(owner.Spec(""), 3), late.before, late.after));
}

TEST_F(MappedTest, ReadsASmallPlanOnTheCallingThreadAsLongAsTheOwnerLives) {
  const auto owner = StartOwner(7);
  owner->Send("start 3");
  ASSERT_EQ(owner->Receive(), "ok");
  Node reader("mapped", dir_.path(), kKvBytes);
  const auto peer = reader.Connect(spec_);
  ASSERT_TRUE(peer.has_value()) << peer.error().ToString();
  Transport& transport = reader.transport();

  const auto done = transport.ReadNow(*peer, Contiguous(0, 4096), Node::guard(3));
  ASSERT_TRUE(done.has_value());
  ASSERT_TRUE(done->status.ok()) << done->status.ToString();
  EXPECT_EQ(done->bytes, 4096U);
  EXPECT_TRUE(GuardHolds(Lease(spec_, 3), done->before, done->after));
  EXPECT_EQ(reader.FirstWrong(7, 4096), std::nullopt);

  EXPECT_FALSE(transport.ReadNow(*peer, Contiguous(0, kSmallRead + 1), Node::guard(3)));
  EXPECT_FALSE(transport.ReadNow(*peer + 1, Contiguous(0, 64), Node::guard(3)));
  const auto outside = transport.ReadNow(*peer, Contiguous(kKvBytes, 64), Node::guard(3));
  ASSERT_TRUE(outside.has_value());
  EXPECT_EQ(outside->status.code(), Code::kInvalidArgument);

  owner->Send("end 3");
  ASSERT_EQ(owner->Receive(), "ok");
  const auto late = transport.ReadNow(*peer, Contiguous(0, 64), Node::guard(3));
  ASSERT_TRUE(late.has_value());
  EXPECT_FALSE(GuardHolds(Lease(spec_, 3), late->before, late->after));

  // While threads read, the owner dies: they see its memory or nothing, and then nothing.
  std::thread other([&] {
    while (transport.ReadNow(*peer, Contiguous(0, 4096), Node::guard(3))) {
    }
  });
  owner->KillAndWait();
  other.join();
  EXPECT_FALSE(transport.ReadNow(*peer, Contiguous(0, 64), Node::guard(3)));
}

TEST_F(MappedTest, ReadsFromAnotherProcess) {
  const auto owner = StartOwner(7);
  Node reader("mapped", dir_.path(), kKvBytes);
  const auto peer = reader.Connect(spec_);
  ASSERT_TRUE(peer.has_value()) << peer.error().ToString();
  ASSERT_TRUE(Read(reader, *peer, Contiguous(0, kKvBytes), Node::guard(0)).status.ok());
  EXPECT_EQ(reader.FirstWrong(7, kKvBytes), std::nullopt);
}

TEST_F(MappedTest, MemoryOfKilledOwnerIsUnmappedWithinASecond) {
  const auto owner = StartOwner(1, kKvBytes);
  Node reader("mapped", dir_.path(), kKvBytes);
  const int before = TimesMapped("kvrelay-test-kv");
  bool dead = false;
  const auto peer = reader.Connect(spec_, [&] { dead = true; });
  ASSERT_TRUE(peer.has_value()) << peer.error().ToString();
  EXPECT_EQ(TimesMapped("kvrelay-test-kv"), before + 1);

  // A read that would go on for hours is under way when the owner dies.
  std::optional<Completion> done;
  reader.transport().Read(*peer, Whole(Endless()), Node::guard(0), In(seconds(60)),
                          [&](Completion c) { done = std::move(c); });
  reader.control().RunFor(milliseconds(30));
  ASSERT_FALSE(done.has_value());
  owner->KillAndWait();
  ASSERT_TRUE(reader.control().RunUntil([&] { return dead; }, seconds(1) * tests::Slowness()));
  EXPECT_EQ(TimesMapped("kvrelay-test-kv"), before);
  // It had failed before the death was reported.
  ASSERT_TRUE(done.has_value());
  EXPECT_EQ(done->status.code(), Code::kPeerUnreachable) << done->status.ToString();
  EXPECT_EQ(Read(reader, *peer, Contiguous(0, 64), Node::guard(0)).status.code(),
            Code::kPeerUnreachable);
}

TEST_F(MappedTest, StoppedOwnerIsStillReadable) {
  const auto owner = StartOwner(5);
  Node reader("mapped", dir_.path(), kKvBytes);
  const auto peer = reader.Connect(spec_);
  ASSERT_TRUE(peer.has_value());
  owner->Signal(SIGSTOP);
  EXPECT_TRUE(Read(reader, *peer, Contiguous(0, kKvBytes), Node::guard(0)).status.ok());
  // But nobody new gets to it, and does not wait for ever.
  Node second("mapped", dir_.path(), kKvBytes);
  EXPECT_THAT(WhyNot(second, spec_, milliseconds(200)), HasSubstr("kDeadlineExceeded"));
}

TEST_F(MappedTest, CancelAndDeadlineEndAReadWithinMilliseconds) {
  Node owner("mapped", dir_.path(), kKvBytes);
  Node reader("mapped", dir_.path(), kKvBytes);
  owner.Fill(1);
  const auto peer = reader.Connect(owner.Spec("owner"));
  ASSERT_TRUE(peer.has_value());

  std::optional<Completion> done;
  const OpId op = reader.transport().Read(*peer, Whole(Endless()), Node::guard(0), In(seconds(60)),
                                          [&](Completion c) { done = std::move(c); });
  reader.control().RunFor(milliseconds(30));
  ASSERT_FALSE(done.has_value());
  const TimePoint asked = In(seconds(0));
  reader.transport().Cancel(op);
  ASSERT_TRUE(reader.control().RunUntil([&] { return done.has_value(); }, seconds(5)));
  EXPECT_EQ(done->status.code(), Code::kCancelled);
  EXPECT_GT(done->bytes, 0U);
  std::cout << "cancelled within " << ToMillis(In(seconds(0)) - asked) << " ms\n";
  // Nothing writes the destination any more.
  std::memset(reader.kv(), 0x5a, kKvBytes);
  reader.control().RunFor(milliseconds(20));
  for (uint64_t i = 0; i < kKvBytes; ++i) ASSERT_EQ(reader.kv()[i], std::byte{0x5a});

  const TimePoint begin = In(seconds(0));
  const Completion late = Read(reader, *peer, Endless(), Node::guard(0), milliseconds(50));
  EXPECT_EQ(late.status.code(), Code::kDeadlineExceeded) << late.status.ToString();
  EXPECT_GE(In(seconds(0)) - begin, milliseconds(50));
  EXPECT_LT(In(seconds(0)) - begin, milliseconds(2000));
}

TEST_F(MappedTest, SmallReadDoesNotWaitForALargeOne) {
  Node owner("mapped", dir_.path(), kKvBytes);
  Node reader("mapped", dir_.path(), kKvBytes);
  const auto peer = reader.Connect(owner.Spec("owner"));
  ASSERT_TRUE(peer.has_value());
  std::optional<Completion> large;
  reader.transport().Read(*peer, Whole(Endless()), Node::guard(0), In(seconds(60)),
                          [&](Completion c) { large = std::move(c); });
  EXPECT_TRUE(Read(reader, *peer, Contiguous(0, 64), Node::guard(0)).status.ok());
  EXPECT_FALSE(large.has_value());
  // Disconnecting ends what is left.
  reader.transport().Disconnect(*peer);
  ASSERT_TRUE(reader.control().RunUntil([&] { return large.has_value(); }));
  EXPECT_EQ(large->status.code(), Code::kCancelled);
}

TEST_F(MappedTest, DestructionCancelsWhatIsInFlight) {
  Node owner("mapped", dir_.path(), kKvBytes);
  Node reader("mapped", dir_.path(), kKvBytes);
  const int mapped = TimesMapped("kvrelay-test-kv");
  const auto peer = reader.Connect(owner.Spec("owner"));
  ASSERT_TRUE(peer.has_value());
  std::optional<Completion> done;
  reader.transport().Read(*peer, Whole(Endless()), Node::guard(0), In(seconds(60)),
                          [&](Completion c) { done = std::move(c); });
  reader.DestroyTransport();
  EXPECT_EQ(TimesMapped("kvrelay-test-kv"), mapped);
  ASSERT_TRUE(reader.control().RunUntil([&] { return done.has_value(); }));
  EXPECT_EQ(done->status.code(), Code::kCancelled);
}

TEST_F(MappedTest, RefusesWhatLeavesTheRegions) {
  Node owner("mapped", dir_.path(), kKvBytes);
  Node reader("mapped", dir_.path(), kKvBytes);
  const auto peer = reader.Connect(owner.Spec("owner"));
  ASSERT_TRUE(peer.has_value());
  const auto code = [&](const CopyPlan& plan, GuardRef guard) {
    return Read(reader, *peer, plan, guard).status.code();
  };
  const CopyPlan good = Contiguous(0, 64);
  EXPECT_EQ(code(good, Node::guard(0)), Code::kOk);
  EXPECT_EQ(code(Contiguous(kKvBytes - 32, 64), Node::guard(0)), Code::kInvalidArgument);
  EXPECT_EQ(code(good, {7, 0}), Code::kInvalidArgument);
  EXPECT_EQ(code(good, {kRecords, 8}), Code::kInvalidArgument);
  EXPECT_EQ(code(good, {kRecords, uint64_t{1} << 40}), Code::kInvalidArgument);
  EXPECT_EQ(code(good, {kRecords, ~uint64_t{63}}), Code::kInvalidArgument);
}

TEST_F(MappedTest, SaysWhyAnOwnerCannotBeMapped) {
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

TEST_F(MappedTest, OwnerThatAcceptsAndSaysNothingCostsADeadline) {
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

TEST_F(MappedTest, MaliciousOwnerIsRefused) {
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

TEST_F(MappedTest, OwnerForgetsReadersThatEndOrMisbehave) {
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

TEST_F(MappedTest, SilentReaderIsClosedAfterTwoSeconds) {
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

TEST_F(MappedTest, SocketFolderIsPrivateAndSwept) {
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

TEST_F(MappedTest, ManyRegionsCrossInBatches) {
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

// Reads the KV in portions of what the lease's progress newly allows: a token is kToken bytes.
class Following {
 public:
  static constexpr uint64_t kToken = 1 << 16;

  Following(GuardExpectation want, uint32_t tokens) : want_(want), tokens_(tokens) {}

  NextPortion next() {
    return [this](const GuardWords& words) -> Result<Portion> {
      if (!IsLease(want_, words)) return Error(Code::kStaleRead, "the lease has ended");
      const uint32_t ready = std::min(tokens_, Progress::Unpack(words.w1).tokens);
      Portion portion{.plan = {}, .last = ready == tokens_};
      if (ready > done_) {
        portion.plan = Contiguous(done_ * kToken, (ready - done_) * kToken);
        ++portions_;
      }
      done_ = ready;
      return portion;
    };
  }
  int portions() const { return portions_; }

 private:
  const GuardExpectation want_;
  const uint32_t tokens_;
  uint32_t done_ = 0;
  std::atomic<int> portions_{0};
};

TEST_F(MappedTest, FollowsAPromptThatIsBeingComputed) {
  Node owner("mapped", dir_.path(), kKvBytes);
  Node reader("mapped", dir_.path(), kKvBytes);
  std::memset(reader.kv(), 0, kKvBytes);
  owner.StartLease(0, 0);
  const auto peer = reader.Connect(owner.Spec("owner"));
  ASSERT_TRUE(peer.has_value()) << peer.error().ToString();
  constexpr uint32_t kTokens = 100;
  Following following(Lease(owner.Spec(""), 0, kTokens), kTokens);
  std::optional<Completion> done;
  reader.transport().Read(*peer, following.next(), Node::guard(0), In(seconds(20)),
                          [&](Completion completion) { done = std::move(completion); });
  std::memset(owner.kv(), 0, kKvBytes);
  for (uint32_t tokens = 10; tokens <= kTokens; tokens += 10) {
    reader.control().RunFor(milliseconds(5));
    EXPECT_FALSE(done.has_value()) << "before token " << tokens;
    std::memset(owner.kv() + (tokens - 10) * Following::kToken, static_cast<int>(tokens),
                10 * Following::kToken);
    owner.record(0)->Publish({.tokens = tokens, .chunk_end = tokens, .layers = 0});
  }
  ASSERT_TRUE(reader.control().RunUntil([&] { return done.has_value(); }));
  ASSERT_TRUE(done->status.ok()) << done->status.ToString();
  EXPECT_EQ(done->bytes, kTokens * Following::kToken);
  EXPECT_TRUE(GuardHolds(Lease(owner.Spec(""), 0, kTokens), done->before, done->after));
  EXPECT_GT(following.portions(), 2) << "it moved while more was computed";
  EXPECT_EQ(std::memcmp(reader.kv(), owner.kv(), kTokens * Following::kToken), 0);
}

TEST_F(MappedTest, AReadThatWaitsHearsOfTheLeasesEndAndOfItsDeadline) {
  Node owner("mapped", dir_.path(), kKvBytes);
  Node reader("mapped", dir_.path(), kKvBytes);
  owner.StartLease(0, 10);
  const auto peer = reader.Connect(owner.Spec("owner"));
  ASSERT_TRUE(peer.has_value()) << peer.error().ToString();
  Following late(Lease(owner.Spec(""), 0), 100);
  const Completion timed_out = reader.Await([&](Done done) {
    return reader.transport().Read(*peer, late.next(), Node::guard(0), In(milliseconds(30)),
                                   std::move(done));
  });
  EXPECT_EQ(timed_out.status.code(), Code::kDeadlineExceeded) << timed_out.status.ToString();
  Following ended(Lease(owner.Spec(""), 0), 100);
  const Completion stale = reader.Await([&](Done done) {
    const OpId op = reader.transport().Read(*peer, ended.next(), Node::guard(0), In(seconds(20)),
                                            std::move(done));
    reader.control().RunFor(milliseconds(5));
    owner.record(0)->End();
    return op;
  });
  EXPECT_EQ(stale.status.code(), Code::kStaleRead) << stale.status.ToString();
}

}  // namespace
}  // namespace kvrelay::transport
