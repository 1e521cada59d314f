#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <atomic>
#include <csignal>
#include <cstring>
#include <fstream>
#include <optional>
#include <string>
#include <thread>

#include "tests/common/slowness.h"
#include "tests/transport/owner_fixture.h"

namespace kvrelay::transport {
namespace {

using std::chrono::milliseconds;
using std::chrono::seconds;
using testing::HasSubstr;

int TimesMapped(const std::string& name) {
  std::ifstream maps("/proc/self/maps");
  int times = 0;
  for (std::string line; std::getline(maps, line);) times += line.find(name) != std::string::npos;
  return times;
}

class MappedTest : public OwnerTest {
 protected:
  static constexpr uint64_t kKvBytes = 8 << 20;

  MappedTest() : OwnerTest("mapped", kKvBytes) {}
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
  const auto owner = StartOwner(1);
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
  EXPECT_LT(In(seconds(0)) - begin, milliseconds(2000) * tests::Slowness());
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
