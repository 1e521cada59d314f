#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <unistd.h>

#include <atomic>
#include <cstdlib>
#include <cstring>
#include <ctime>
#include <filesystem>
#include <fstream>
#include <iostream>
#include <optional>
#include <set>
#include <sstream>
#include <string>
#include <thread>
#include <vector>

#include "tests/common/slowness.h"
#include "tests/transport/ucx_rail_fixture.h"
#include "transport/packed_wire.h"
#include "transport/ucx_version.h"

namespace kvrelay::transport {
namespace {

using testing::HasSubstr;

TEST_F(UcxRailTest, StreamsFromAnotherProcess) {
  const auto owner = StartOwner(3);
  Node reader("ucx-rail", "", kKvBytes);
  const auto peer = reader.Connect(spec_);
  ASSERT_TRUE(peer.has_value()) << peer.error().ToString();
  for (const uint32_t chunks : {1U, 2U, 7U, kAllChunks}) {
    std::memset(reader.kv(), 0, kKvBytes);
    const Completion done = Receive(reader, *peer, 100 + chunks, chunks, Lease(spec_, 0),
                                    [&] { owner->Send(SendLine(reader, 100 + chunks, chunks)); });
    ASSERT_TRUE(done.status.ok()) << done.status.ToString();
    EXPECT_EQ(done.bytes, chunks * kChunk);
    EXPECT_TRUE(GuardHolds(Lease(spec_, 0), done.before, done.after));
    EXPECT_EQ(reader.FirstWrong(3, chunks * kChunk), std::nullopt);
    EXPECT_EQ(owner->Receive(), "sent kOk");
  }
}

TEST_F(UcxRailTest, TwoProcessesWorthOfStreamsCrossAtOnce) {
  Node a("ucx-rail", "", kKvBytes);
  Node b("ucx-rail", "", kKvBytes);
  Node c("ucx-rail", "", kKvBytes);
  a.Fill(1);
  a.StartLease(0);
  b.Fill(2);
  b.StartLease(0);
  c.Fill(0);
  const auto b_to_a = b.Connect(a.Spec("a"));
  const auto c_to_a = c.Connect(a.Spec("a"));
  const auto c_to_b = c.Connect(b.Spec("b"));
  ASSERT_TRUE(b_to_a.has_value() && c_to_a.has_value() && c_to_b.has_value());
  // b is owner and reader in one. Each stream fills chunks of its own, so that c sees who wrote
  // where.
  int open = 0;
  const auto start = [&](Node& owner, Node& reader, PeerHandle peer, StreamId id, uint32_t first) {
    constexpr uint32_t kChunks = 10;
    const auto shifted = [first](StreamPlan plan) {
      return StreamPlan{plan.chunks, plan.max_chunk_bytes,
                        [plan, first](uint32_t chunk) { return plan.plan_chunk(first + chunk); }};
    };
    open += 2;
    const auto finished = [&open](const Completion& done) {
      EXPECT_TRUE(done.status.ok()) << done.status.ToString();
      EXPECT_EQ(done.bytes, kChunks * kChunk);
      --open;
    };
    reader.transport().StartPackedReceive(peer, id, shifted(ReceivePlan(kChunks, kChunk)),
                                          Lease(owner.Spec(""), 0), In(seconds(20)), finished);
    owner.transport().StartPackedSend(reader.Spec("reader"), id, shifted(SendPlan(kChunks, kChunk)),
                                      owner.record(0), Lease(owner.Spec(""), 0), In(seconds(20)),
                                      finished);
  };
  for (uint32_t i = 0; i < 3; ++i) {
    start(a, c, *c_to_a, 10 + i, i * 10);
    start(b, c, *c_to_b, 20 + i, 30 + i * 10);
  }
  ASSERT_TRUE(c.control().RunUntil([&] {
    a.control().RunFor(milliseconds(1));
    b.control().RunFor(milliseconds(1));
    return open == 0;
  }));
  EXPECT_EQ(c.FirstWrong(1, 30 * kChunk), std::nullopt);
  EXPECT_EQ(std::memcmp(c.kv() + 30 * kChunk, b.kv() + 30 * kChunk, 30 * kChunk), 0);
  start(a, b, *b_to_a, 30, 0);
  ASSERT_TRUE(b.control().RunUntil([&] {
    a.control().RunFor(milliseconds(1));
    return open == 0;
  }));
  EXPECT_EQ(b.FirstWrong(1, 10 * kChunk), std::nullopt);
}

TEST_F(UcxRailTest, CancelledReceiveIsNotWrittenAnyMore) {
  const auto owner = StartOwner(3);
  Node reader("ucx-rail", "", kKvBytes);
  const auto peer = reader.Connect(spec_);
  ASSERT_TRUE(peer.has_value());
  std::optional<Completion> done;
  std::atomic<uint32_t> unpacked{0};
  StreamPlan plan = ReceivePlan(kAllChunks, kChunk);
  plan.plan_chunk = [inner = plan.plan_chunk, &unpacked](uint32_t chunk) {
    unpacked = chunk + 1;
    return inner(chunk);
  };
  const OpId op = reader.transport().StartPackedReceive(
      *peer, 1, plan, Lease(spec_, 0), In(seconds(60)), [&](Completion c) { done = std::move(c); });
  owner->Send(SendLine(reader, 1, kAllChunks));
  ASSERT_TRUE(reader.control().RunUntil([&] { return unpacked >= 3; }));
  const TimePoint asked = In(seconds(0));
  reader.transport().Cancel(op);
  ASSERT_TRUE(reader.control().RunUntil([&] { return done.has_value(); }));
  std::cout << "cancelled within " << ToMillis(In(seconds(0)) - asked) << " ms after "
            << done->bytes / kChunk << " chunks\n";
  if (done->status.ok()) GTEST_SKIP() << "the stream was faster than the test";
  EXPECT_EQ(done->status.code(), Code::kCancelled);
  std::memset(reader.kv(), 0x5a, kKvBytes);
  EXPECT_EQ(owner->Receive(), "sent kOk");
  EXPECT_TRUE(reader.control().RunUntil(
      [&] { return CountersOf(reader)["dropped_messages"] == kAllChunks - done->bytes / kChunk; }));
  for (uint64_t i = 0; i < kKvBytes; ++i) ASSERT_EQ(reader.kv()[i], std::byte{0x5a});
  // The number of a finished stream may not come back, but another one does.
  EXPECT_TRUE(Receive(reader, *peer, 2, 4, Lease(spec_, 0), [&] {
                owner->Send(SendLine(reader, 2, 4));
              }).status.ok());
}

TEST_F(UcxRailTest, FirstChunkFindsAStreamThatWasJustStarted) {
  // Both threads are awake and busy, so that chunks come as early as they can.
  Node owner("ucx-rail", "", kKvBytes);
  Node reader("ucx-rail", "", kKvBytes);
  owner.StartLease(0);
  const auto peer = reader.Connect(owner.Spec("owner"));
  ASSERT_TRUE(peer.has_value());
  for (StreamId id = 1; id <= 500; ++id) {
    const Completion done = Receive(reader, *peer, id, 2, Lease(owner.Spec(""), 0), [&] {
      owner.transport().StartPackedSend(reader.Spec("reader"), id, SendPlan(2, 64), owner.record(0),
                                        Lease(owner.Spec(""), 0), In(seconds(20)),
                                        [](const Completion&) {});
    });
    // The plans differ on purpose: only a chunk that found its stream can be of the wrong length.
    ASSERT_EQ(done.status.code(), Code::kInternal) << done.status.ToString();
    ASSERT_THAT(done.status.message(), HasSubstr("chunk 0 has 64 bytes"));
  }
}

TEST_F(UcxRailTest, SaysWhyAnOwnerCannotBeReached) {
  Node reader("ucx-rail", "", 1 << 20);
  const auto owner = StartOwner(1);
  const auto why = [&](const PeerSpec& spec) {
    const auto peer = reader.Connect(
        spec, [] {}, seconds(2));
    return peer.has_value() ? "connected" : peer.error().ToString();
  };
  EXPECT_EQ(why(spec_), "connected");
  PeerSpec other = spec_;
  other.incarnation += 1;
  EXPECT_THAT(why(other), HasSubstr("another incarnation"));
  for (const std::string& garbage : {std::string(), std::string("garbage"), std::string(5000, 'x'),
                                     spec_.address.substr(0, spec_.address.size() - 1)}) {
    other.address = garbage;
    EXPECT_THAT(why(other), HasSubstr("kInvalidArgument"));
  }
  PackedAddress release = *PackedAddress::Decode(spec_.address);
  release.library = "ucx 1.3.0";
  other = spec_;
  other.address = release.Encode();
  EXPECT_THAT(why(other), HasSubstr("kIncompatible: the peer has ucx 1.3.0, we have ucx 1."));
  owner->KillAndWait();
  EXPECT_THAT(why(spec_), HasSubstr("kPeerUnreachable"));

  Options options;
  options.executor = [](auto) {};
  options.data_interface = "eth987";
  const auto none = CreateUcxPacked(options);
  ASSERT_FALSE(none.has_value());
  EXPECT_THAT(none.error().ToString(), HasSubstr("no network interface eth987"));
}

TEST_F(UcxRailTest, UsersEnvironmentBreaksNothing) {
  const std::pair<const char*, const char*> hostile[] = {{"UCX_TLS", "ib"},
                                                         {"UCX_NET_DEVICES", "nothing0"},
                                                         {"UCX_RNDV_THRESH", "0"},
                                                         {"UCX_TCP_TX_SEG_SIZE", "1k"},
                                                         {"UCX_TCP_RX_SEG_SIZE", "1k"},
                                                         {"UCX_PROTO_ENABLE", "n"},
                                                         {"UCX_ZCOPY_THRESH", "0"},
                                                         {"UCX_LOG_LEVEL", "info"},
                                                         {"UCX_TCP_PORT_RANGE", "1-2"},
                                                         {"UCX_TCP_CONN_NB", "y"},
                                                         {"UCX_KEEPALIVE_INTERVAL", "1us"}};
  for (const auto& [name, value] : hostile) setenv(name, value, 1);
  const auto owner = StartOwner(8);
  for (const auto& [name, value] : hostile) unsetenv(name);
  Node reader("ucx-rail", "", kKvBytes);
  const auto peer = reader.Connect(spec_);
  ASSERT_TRUE(peer.has_value()) << peer.error().ToString();
  const Completion done = Receive(reader, *peer, 1, kAllChunks, Lease(spec_, 0),
                                  [&] { owner->Send(SendLine(reader, 1, kAllChunks)); });
  ASSERT_TRUE(done.status.ok()) << done.status.ToString();
  EXPECT_EQ(reader.FirstWrong(8, kKvBytes), std::nullopt);
}

// Inodes of this process's sockets, and the local address of every TCP socket that listens.
TEST_F(UcxRailTest, ListensOnLoopbackOnly) {
  Node node("ucx-rail", "", 1 << 20);
  std::set<std::string> inodes;
  for (const auto& entry : std::filesystem::directory_iterator("/proc/self/fd")) {
    std::error_code error;
    const std::string target = std::filesystem::read_symlink(entry.path(), error).string();
    if (target.rfind("socket:[", 0) == 0) inodes.insert(target.substr(8, target.size() - 9));
  }
  int listening = 0;
  for (const char* table : {"/proc/net/tcp", "/proc/net/tcp6"}) {
    std::ifstream file(table);
    std::string line;
    std::getline(file, line);
    while (std::getline(file, line)) {
      std::istringstream in(line);
      std::vector<std::string> fields;
      for (std::string field; in >> field;) fields.push_back(field);
      if (fields.at(3) != "0A" || !inodes.contains(fields.at(9))) continue;
      ++listening;
      EXPECT_EQ(fields.at(1).substr(0, 8), "0100007F") << table << ": " << line;
    }
  }
  EXPECT_GT(listening, 0);
}

TEST_F(UcxRailTest, ManyConnectionsLeaveNothingBehind) {
  const auto owner = StartOwner(1);
  const auto descriptors = [] {
    return std::distance(std::filesystem::directory_iterator("/proc/self/fd"),
                         std::filesystem::directory_iterator());
  };
  Node steady("ucx-rail", "", 1 << 20);
  ASSERT_TRUE(steady.Connect(spec_).has_value());
  const auto before = descriptors();
  for (int i = 0; i < 20; ++i) {
    Node reader("ucx-rail", "", 1 << 20);
    const auto peer = reader.Connect(spec_);
    ASSERT_TRUE(peer.has_value()) << peer.error().ToString();
    ASSERT_TRUE(Receive(reader, *peer, 1, 2, Lease(spec_, 0), [&] {
                  owner->Send(SendLine(reader, 1, 2));
                }).status.ok());
    EXPECT_EQ(owner->Receive(), "sent kOk");
  }
  EXPECT_TRUE(steady.control().RunUntil([&] { return descriptors() <= before; }, seconds(5)));
}

// Resident memory of this process, which is both sides of the connections.
TEST_F(UcxRailTest, AConnectionTakesAtMostTheMemoryThatIsReported) {
  if (tests::Slowness() > 1) GTEST_SKIP() << "a sanitizer has memory of its own";
  constexpr uint64_t kPeers = 12;
  const auto resident = [] {
    uint64_t all = 0;
    uint64_t pages = 0;
    std::ifstream("/proc/self/statm") >> all >> pages;
    return pages * static_cast<uint64_t>(sysconf(_SC_PAGESIZE));
  };
  Node reader("ucx-rail", "", kKvBytes);
  reader.Fill(1);
  std::vector<std::unique_ptr<Node>> owners;
  for (uint64_t i = 0; i < kPeers; ++i) {
    owners.push_back(std::make_unique<Node>("ucx-rail", "", kKvBytes));
    owners.back()->Fill(i);
    owners.back()->StartLease(0);
  }
  const auto stream_from = [&](Node& owner) {
    const PeerSpec spec = owner.Spec("owner");
    const auto peer = reader.Connect(spec);
    ASSERT_TRUE(peer.has_value()) << peer.error().ToString();
    const Completion done = Receive(reader, *peer, 1, kAllChunks, Lease(spec, 0), [&] {
      owner.transport().StartPackedSend(reader.Spec("reader"), 1, SendPlan(kAllChunks, kChunk),
                                        owner.record(0), Lease(spec, 0), In(seconds(20)),
                                        [](const Completion&) {});
    });
    ASSERT_TRUE(done.status.ok()) << done.status.ToString();
  };
  stream_from(*owners.front());  // pools and rings that do not depend on the number of peers
  const uint64_t before = resident();
  for (uint64_t i = 1; i < kPeers; ++i) stream_from(*owners[i]);
  const uint64_t ring = CountersOf(reader)["ring_bytes"];
  const uint64_t most = CountersOf(reader)["max_bytes_per_peer"];
  EXPECT_EQ(CountersOf(reader)["connections"], kPeers);
  const auto grown = static_cast<double>(resident() - std::min(before, resident()));
  std::cout << "a connection took " << grown / 1024 / (kPeers - 1)
            << " KiB on both sides together, with the owner's ring of " << ring / 1024
            << " KiB; reported: at most " << most / 1024 << " KiB a side\n";
  // UCX's pools on the owners' side grow by eight buffers at a time.
  EXPECT_LT(grown / (kPeers - 1), static_cast<double>(ring + 2 * most + 16 * kChunk));
}

TEST_F(UcxRailTest, SleepsWhenNothingHappens) {
  Node a("ucx-rail", "", 1 << 20);
  Node b("ucx-rail", "", 1 << 20);
  ASSERT_TRUE(a.Connect(b.Spec("b")).has_value());
  std::this_thread::sleep_for(milliseconds(50));
  timespec begin{};
  timespec end{};
  clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &begin);
  std::this_thread::sleep_for(milliseconds(500));
  clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &end);
  const double ms = (end.tv_sec - begin.tv_sec) * 1e3 + (end.tv_nsec - begin.tv_nsec) / 1e6;
  std::cout << "two idle transports used " << ms << " ms of CPU in 500 ms\n";
  EXPECT_LT(ms, 50);
}

TEST(UcxVersionTest, IsThatOfTheLibrary) {
  EXPECT_THAT(UcxVersion(), testing::MatchesRegex("1\\.[0-9]+\\.[0-9]+.*"));
}

// Chunk c holds the tokens [25 * (c / 4), + 25) of layer c % 4.
KvExtent ExtentOf(uint32_t chunk) {
  return {.tokens = 25 * (chunk / 4 + 1), .layers = chunk % 4 + 1};
}

TEST_F(UcxRailTest, FollowsAPromptThatIsBeingComputed) {
  constexpr uint32_t kLayers = 4;
  constexpr uint32_t kChunks = 4 * kLayers;
  Node owner("ucx-rail", "", kKvBytes);
  Node reader("ucx-rail", "", kKvBytes);
  owner.Fill(5);
  owner.StartLease(0, 0);
  std::memset(reader.kv(), 0, kKvBytes);
  const auto peer = reader.Connect(owner.Spec("owner"));
  ASSERT_TRUE(peer.has_value()) << peer.error().ToString();
  StreamPlan receive = ReceivePlan(kChunks, kChunk);
  receive.extent_of = ExtentOf;
  StreamPlan send = SendPlan(kChunks, kChunk);
  send.extent_of = ExtentOf;
  std::optional<Completion> received;
  std::optional<Completion> sent;
  reader.transport().StartPackedReceive(*peer, 9, receive, Lease(owner.Spec(""), 0),
                                        In(seconds(20)),
                                        [&](Completion done) { received = std::move(done); });
  owner.transport().StartPackedSend(reader.Spec("reader"), 9, send, owner.record(0),
                                    Lease(owner.Spec(""), 0), In(seconds(20)),
                                    [&](Completion done) { sent = std::move(done); });
  const auto first_of = [&](uint32_t chunk) { return reader.kv() + chunk * kChunk; };
  const auto arrived = [&](uint32_t chunk) {
    return std::memcmp(first_of(chunk), owner.kv() + chunk * kChunk, kChunk) == 0;
  };
  for (uint32_t part = 0; part < 4; ++part) {
    for (uint32_t layer = 0; layer < kLayers; ++layer) {
      const uint32_t chunk = part * kLayers + layer;
      owner.control().RunFor(milliseconds(3));
      EXPECT_FALSE(arrived(chunk)) << "chunk " << chunk << " was not computed yet";
      EXPECT_FALSE(received.has_value() || sent.has_value());
      owner.record(0)->Publish(
          {.tokens = 25 * part, .chunk_end = 25 * (part + 1), .layers = layer + 1});
      EXPECT_TRUE(reader.control().RunUntil([&] { return arrived(chunk); })) << chunk;
    }
  }
  EXPECT_TRUE(reader.control().RunUntil([&] { return received.has_value(); }));
  EXPECT_TRUE(owner.control().RunUntil([&] { return sent.has_value(); }));
  EXPECT_TRUE(received->status.ok()) << received->status.ToString();
  EXPECT_TRUE(sent->status.ok()) << sent->status.ToString();
  EXPECT_EQ(reader.FirstWrong(5, kChunks * kChunk), std::nullopt);
}

TEST_F(UcxRailTest, AStreamThatWaitsHearsOfTheLeasesEnd) {
  Node owner("ucx-rail", "", kKvBytes);
  Node reader("ucx-rail", "", kKvBytes);
  owner.StartLease(0, 25);
  const auto peer = reader.Connect(owner.Spec("owner"));
  ASSERT_TRUE(peer.has_value()) << peer.error().ToString();
  StreamPlan receive = ReceivePlan(8, kChunk);
  receive.extent_of = ExtentOf;
  StreamPlan send = SendPlan(8, kChunk);
  send.extent_of = ExtentOf;
  std::optional<Completion> sent;
  const Completion received = Receive(reader, *peer, 9, receive, Lease(owner.Spec(""), 0), [&] {
    owner.transport().StartPackedSend(reader.Spec("reader"), 9, send, owner.record(0),
                                      Lease(owner.Spec(""), 0), In(seconds(20)),
                                      [&](Completion done) { sent = std::move(done); });
    owner.control().RunFor(milliseconds(10));
    EXPECT_FALSE(sent.has_value());
    owner.record(0)->End();
  });
  EXPECT_FALSE(received.status.ok());
  EXPECT_TRUE(owner.control().RunUntil([&] { return sent.has_value(); }));
  EXPECT_EQ(sent->status.code(), Code::kStaleRead) << sent->status.ToString();
}

}  // namespace
}  // namespace kvrelay::transport
