#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <chrono>
#include <csignal>
#include <cstdlib>
#include <ctime>
#include <optional>
#include <string>
#include <thread>

#include "tests/common/slowness.h"
#include "tests/transport/owner_fixture.h"
#include "transport/get_address.h"
#include "transport/ucx_one_sided.h"

namespace kvrelay::transport {
namespace {

using std::chrono::milliseconds;
using std::chrono::seconds;
using testing::HasSubstr;

class UcxGetTest : public OwnerTest {
 protected:
  static constexpr uint64_t kKvBytes = 8 << 20;

  UcxGetTest() : OwnerTest("ucx-get", kKvBytes) {}
  void SetUp() override {
    if (const auto lanes = FindOneSidedLanes(""); !lanes.has_value()) {
      GTEST_SKIP() << lanes.error().message();
    }
  }
  // Whether no read and no closing connection is left soon. The counters follow what the control
  // thread is told.
  static bool LeavesNothing(Node& reader) {
    return reader.control().RunUntil(
        [&] {
          auto counters = CountersOf(reader);
          return counters["reads"] == 0 && counters["quarantined_reads"] == 0 &&
                 counters["closing_connections"] == 0;
        },
        seconds(5));
  }
};

TEST_F(UcxGetTest, ReadsDataBetweenTwoReadsOfTheGuard) {
  const auto owner = StartOwner(1);
  Node reader("ucx-get", "", kKvBytes);
  const auto peer = reader.Connect(spec_);
  ASSERT_TRUE(peer.has_value()) << peer.error().ToString();
  const Completion done = Read(reader, *peer, Whole(Contiguous(0, kKvBytes)), Node::guard(0));
  ASSERT_TRUE(done.status.ok()) << done.status.ToString();
  EXPECT_EQ(done.bytes, kKvBytes);
  EXPECT_TRUE(GuardHolds(Lease(spec_, 0), done.before, done.after));
  EXPECT_EQ(reader.FirstWrong(1, kKvBytes), std::nullopt);

  owner->Send("end 0");
  ASSERT_EQ(owner->Receive(), "ok");
  const Completion late = Read(reader, *peer, Whole(Contiguous(0, 64)), Node::guard(0));
  ASSERT_TRUE(late.status.ok());
  EXPECT_FALSE(GuardHolds(Lease(spec_, 0), late.before, late.after));
}

// One-sided in truth: the owner's processor has no part in it.
TEST_F(UcxGetTest, StoppedOwnerIsStillReadable) {
  const auto owner = StartOwner(5);
  Node reader("ucx-get", "", kKvBytes);
  const auto peer = reader.Connect(spec_);
  ASSERT_TRUE(peer.has_value()) << peer.error().ToString();
  owner->Signal(SIGSTOP);
  EXPECT_TRUE(Read(reader, *peer, Whole(Contiguous(0, kKvBytes)), Node::guard(0)).status.ok());
  EXPECT_EQ(reader.FirstWrong(5, kKvBytes), std::nullopt);
  owner->Signal(SIGCONT);
}

TEST_F(UcxGetTest, KilledOwnerFailsItsReadsAndIsReported) {
  const auto owner = StartOwner(2);
  Node reader("ucx-get", "", kKvBytes);
  bool dead = false;
  const auto peer = reader.Connect(spec_, [&] { dead = true; });
  ASSERT_TRUE(peer.has_value()) << peer.error().ToString();
  std::optional<Completion> done;
  reader.transport().Read(*peer, Whole(Endless()), Node::guard(0), In(seconds(60)),
                          [&](Completion c) {
                            EXPECT_FALSE(dead) << "the death was reported before";
                            done = std::move(c);
                          });
  reader.control().RunFor(milliseconds(30));
  ASSERT_FALSE(done.has_value());
  owner->KillAndWait();
  ASSERT_TRUE(reader.control().RunUntil([&] { return dead; }, seconds(3) * tests::Slowness()));
  ASSERT_TRUE(done.has_value());
  EXPECT_EQ(done->status.code(), Code::kPeerUnreachable) << done->status.ToString();
  EXPECT_EQ(Read(reader, *peer, Whole(Contiguous(0, 64)), Node::guard(0)).status.code(),
            Code::kPeerUnreachable);
  EXPECT_TRUE(LeavesNothing(reader));
}

TEST_F(UcxGetTest, IdleReaderHearsOfADeath) {
  const auto owner = StartOwner(2);
  Node reader("ucx-get", "", kKvBytes);
  bool dead = false;
  const auto peer = reader.Connect(spec_, [&] { dead = true; });
  ASSERT_TRUE(peer.has_value()) << peer.error().ToString();
  owner->KillAndWait();
  EXPECT_TRUE(reader.control().RunUntil([&] { return dead; }, seconds(10) * tests::Slowness()));
}

TEST_F(UcxGetTest, CancelAndDeadlineEndAReadSoon) {
  const auto owner = StartOwner(3);
  Node reader("ucx-get", "", kKvBytes);
  const auto peer = reader.Connect(spec_);
  ASSERT_TRUE(peer.has_value()) << peer.error().ToString();
  EXPECT_EQ(Read(reader, *peer, Whole(Endless()), Node::guard(0), milliseconds(50)).status.code(),
            Code::kDeadlineExceeded);
  std::optional<Completion> done;
  const OpId op = reader.transport().Read(*peer, Whole(Endless()), Node::guard(0), In(seconds(60)),
                                          [&](Completion c) { done = std::move(c); });
  reader.control().RunFor(milliseconds(20));
  reader.transport().Cancel(op);
  reader.transport().Cancel(op);
  ASSERT_TRUE(reader.control().RunUntil([&] { return done.has_value(); },
                                        milliseconds(500) * tests::Slowness()));
  EXPECT_EQ(done->status.code(), Code::kCancelled);
  // Neither cost the connection.
  EXPECT_TRUE(Read(reader, *peer, Whole(Contiguous(0, 4096)), Node::guard(0)).status.ok());
}

TEST_F(UcxGetTest, SmallReadDoesNotWaitForALargeOne) {
  const auto owner = StartOwner(3);
  Node reader("ucx-get", "", kKvBytes);
  const auto peer = reader.Connect(spec_);
  ASSERT_TRUE(peer.has_value()) << peer.error().ToString();
  const OpId large = reader.transport().Read(*peer, Whole(Endless()), Node::guard(0),
                                             In(seconds(60)), [](const Completion&) {});
  EXPECT_TRUE(Read(reader, *peer, Whole(Contiguous(0, 4096)), Node::guard(0),
                   seconds(1) * tests::Slowness())
                  .status.ok());
  reader.transport().Cancel(large);
  // Destruction ends what is left.
}

TEST_F(UcxGetTest, RefusesWhatItCannotRead) {
  const auto owner = StartOwner(3);
  Node reader("ucx-get", "", kKvBytes);
  const auto peer = reader.Connect(spec_);
  ASSERT_TRUE(peer.has_value()) << peer.error().ToString();
  const CopyPlan outside = Contiguous(kKvBytes - 8, 16);
  EXPECT_EQ(Read(reader, *peer, Whole(outside), Node::guard(0)).status.code(),
            Code::kInvalidArgument);
  EXPECT_EQ(Read(reader, *peer, Whole(Contiguous(0, 64)), GuardRef{9, 0}).status.code(),
            Code::kInvalidArgument);
  CopyPlan cast = Contiguous(0, 64);
  cast.boxes[0].casts = true;
  cast.boxes[0].cast = {.from = DType::kFp32, .to = DType::kFp16};
  cast.factors = {1};
  EXPECT_EQ(reader.transport().FitnessFor(cast).fit, Fitness::Fit::kNo);
  EXPECT_EQ(reader.transport().FitnessFor(Contiguous(0, 4096)).fit, Fitness::Fit::kPoor);
  EXPECT_EQ(reader.transport().FitnessFor(Contiguous(0, 1 << 20)).fit, Fitness::Fit::kGood);
  const Completion refused = Read(reader, *peer, Whole(cast), Node::guard(0));
  EXPECT_EQ(refused.status.code(), Code::kIncompatible);
  EXPECT_THAT(refused.status.message(), HasSubstr("cast"));
  EXPECT_TRUE(Read(reader, *peer, Whole(Contiguous(0, 64)), Node::guard(0)).status.ok());
}

TEST_F(UcxGetTest, SaysWhyAnOwnerCannotBeReached) {
  const auto owner = StartOwner(3);
  Node reader("ucx-get", "", kKvBytes);
  PeerSpec spec = spec_;
  spec.incarnation ^= 1;
  EXPECT_THAT(WhyNot(reader, spec), HasSubstr("another process"));
  spec = spec_;
  spec.region_bytes[0] *= 2;
  EXPECT_THAT(WhyNot(reader, spec), HasSubstr("other regions"));
  spec = spec_;
  spec.address[spec.address.size() / 2] ^= 1;
  EXPECT_THAT(WhyNot(reader, spec), HasSubstr("not an address"));
  auto other = GetAddress::Decode(spec_.address).value();
  other.library = "ucx 1.13.1";
  spec.address = other.Encode();
  EXPECT_THAT(WhyNot(reader, spec), HasSubstr("the peer has ucx 1.13.1"));
  other = GetAddress::Decode(spec_.address).value();
  other.host.host_id = "elsewhere";
  spec.address = other.Encode();
  EXPECT_THAT(WhyNot(reader, spec), HasSubstr("another host"));
  owner->KillAndWait();
  EXPECT_THAT(WhyNot(reader, spec_), testing::Not("connected"));
}

// Where nothing is mapped in any process.
constexpr uint64_t kNowhere = 0x1000;

TEST_F(UcxGetTest, AnOwnerWhoseMemoryCannotBeReadIsNotConnected) {
  const auto owner = StartOwner(3);
  Node reader("ucx-get", "", kKvBytes);
  PeerSpec spec = spec_;
  GetAddress address = GetAddress::Decode(spec_.address).value();
  address.beacon.base = kNowhere;
  spec.address = address.Encode();
  EXPECT_THAT(WhyNot(reader, spec), HasSubstr("no one-sided read of it: "));
  EXPECT_TRUE(LeavesNothing(reader));
  EXPECT_EQ(WhyNot(reader, spec_), "connected");
}

// UCX calls such operations over before it has let go of them: the read ends with the connection.
TEST_F(UcxGetTest, AReadThatFailsEndsOnceItsConnectionHasClosed) {
  const auto owner = StartOwner(3);
  Node reader("ucx-get", "", kKvBytes);
  PeerSpec spec = spec_;
  GetAddress address = GetAddress::Decode(spec_.address).value();
  address.regions[kKv].base = kNowhere;
  spec.address = address.Encode();
  bool dead = false;
  const auto peer = reader.Connect(spec, [&] { dead = true; });
  ASSERT_TRUE(peer.has_value()) << peer.error().ToString();
  const Completion done = Read(reader, *peer, Whole(Contiguous(0, kKvBytes)), Node::guard(0));
  EXPECT_EQ(done.status.code(), Code::kPeerUnreachable) << done.status.ToString();
  EXPECT_TRUE(reader.control().RunUntil([&] { return dead; }));
  EXPECT_TRUE(LeavesNothing(reader));
  // Nothing of it lands later, and another way to the same owner works.
  reader.Fill(8);
  const auto again = reader.Connect(spec_);
  ASSERT_TRUE(again.has_value()) << again.error().ToString();
  reader.control().RunFor(milliseconds(20));
  EXPECT_EQ(reader.FirstWrong(8, kKvBytes), std::nullopt);
  EXPECT_TRUE(Read(reader, *again, Whole(Contiguous(0, kKvBytes)), Node::guard(0)).status.ok());
  EXPECT_EQ(reader.FirstWrong(3, kKvBytes), std::nullopt);
}

TEST_F(UcxGetTest, UsersEnvironmentBreaksNothing) {
  const std::pair<const char*, const char*> bad[] = {{"UCX_TLS", "tcp"},
                                                     {"UCX_RNDV_THRESH", "0"},
                                                     {"UCX_PROTO_ENABLE", "n"},
                                                     {"UCX_NET_DEVICES", "none"},
                                                     {"UCX_POSIX_ERROR_HANDLING", "n"}};
  for (const auto& [name, value] : bad) setenv(name, value, 1);
  {
    const auto owner = StartOwner(8);
    Node reader("ucx-get", "", kKvBytes);
    const auto peer = reader.Connect(spec_);
    ASSERT_TRUE(peer.has_value()) << peer.error().ToString();
    EXPECT_TRUE(Read(reader, *peer, Whole(Contiguous(0, kKvBytes)), Node::guard(0)).status.ok());
    EXPECT_EQ(reader.FirstWrong(8, kKvBytes), std::nullopt);
  }
  for (const auto& [name, value] : bad) unsetenv(name);
}

TEST_F(UcxGetTest, FollowsAPromptThatIsBeingComputed) {
  Node owner("ucx-get", "", kKvBytes);
  Node reader("ucx-get", "", kKvBytes);
  owner.Fill(4);
  owner.StartLease(0, 0);
  const auto peer = reader.Connect(owner.Spec("owner"));
  ASSERT_TRUE(peer.has_value()) << peer.error().ToString();
  constexpr uint32_t kSteps = 16;
  std::thread prefill([&] {
    for (uint32_t step = 1; step <= kSteps; ++step) {
      std::this_thread::sleep_for(milliseconds(3));
      owner.record(0)->Publish({.tokens = step, .chunk_end = step, .layers = 0});
    }
  });
  uint32_t read = 0;
  uint32_t portions = 0;
  const Completion done = Read(
      reader, *peer,
      [&](const GuardWords& words) -> Result<Portion> {
        const uint32_t tokens = Progress::Unpack(words.w1).tokens;
        if (tokens == read) return Portion{{}, false};
        constexpr uint64_t kToken = kKvBytes / kSteps;
        CopyPlan plan = Contiguous(read * kToken, (tokens - read) * kToken);
        read = tokens;
        ++portions;
        return Portion{std::move(plan), tokens == kSteps};
      },
      Node::guard(0));
  prefill.join();
  ASSERT_TRUE(done.status.ok()) << done.status.ToString();
  EXPECT_GT(portions, 1U);
  EXPECT_EQ(reader.FirstWrong(4, kKvBytes), std::nullopt);
  EXPECT_EQ(Progress::Unpack(done.after.w1).tokens, kSteps);
}

TEST_F(UcxGetTest, ManyConnectionsLeaveNothingBehind) {
  const auto owner = StartOwner(6);
  Node reader("ucx-get", "", kKvBytes);
  for (int i = 0; i < 30; ++i) {
    const auto peer = reader.Connect(spec_);
    ASSERT_TRUE(peer.has_value()) << peer.error().ToString();
    std::optional<Completion> done;
    reader.transport().Read(*peer, Whole(Endless()), Node::guard(0), In(seconds(60)),
                            [&](Completion c) { done = std::move(c); });
    reader.transport().Disconnect(*peer);
    ASSERT_TRUE(reader.control().RunUntil([&] { return done.has_value(); }));
    EXPECT_EQ(done->status.code(), Code::kCancelled) << done->status.ToString();
  }
  EXPECT_TRUE(LeavesNothing(reader));
}

TEST_F(UcxGetTest, SleepsWhenNothingHappens) {
  const auto owner = StartOwner(6);
  Node reader("ucx-get", "", kKvBytes);
  const auto peer = reader.Connect(spec_);
  ASSERT_TRUE(peer.has_value()) << peer.error().ToString();
  reader.control().RunFor(milliseconds(50));
  const std::clock_t before = std::clock();
  std::this_thread::sleep_for(seconds(1));
  const double used = static_cast<double>(std::clock() - before) / CLOCKS_PER_SEC;
  EXPECT_LT(used, 0.05 * tests::Slowness());
}

TEST(GetAddressTest, DecodesOnlyWhatItEncodes) {
  const GetAddress address{.library = "ucx 1.22.0",
                           .host = {.host_id = "here", .uid = 7},
                           .incarnation = 77,
                           .worker = std::string("w\0rker", 6),
                           .beacon = {0x1000, sizeof(Beacon), "key"},
                           .regions = {{0x2000, 4096, "k1"}, {0x9000, 64, ""}}};
  const Address bytes = address.Encode();
  const auto back = GetAddress::Decode(bytes);
  ASSERT_TRUE(back.has_value());
  EXPECT_EQ(back->worker, address.worker);
  EXPECT_EQ(back->incarnation, address.incarnation);
  EXPECT_EQ(back->host.host_id, address.host.host_id);
  EXPECT_EQ(back->host.uid, address.host.uid);
  EXPECT_EQ(back->beacon, address.beacon);
  EXPECT_EQ(back->regions, address.regions);
  for (size_t n = 0; n < bytes.size(); ++n) {
    EXPECT_FALSE(GetAddress::Decode(std::string_view(bytes).substr(0, n)).has_value());
    Address damaged = bytes;
    damaged[n] = static_cast<char>(damaged[n] ^ 4);
    EXPECT_FALSE(GetAddress::Decode(damaged).has_value()) << n;
  }
  EXPECT_FALSE(GetAddress::Decode(bytes + "x").has_value());
}

}  // namespace
}  // namespace kvrelay::transport
