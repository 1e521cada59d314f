// `mapped` where the KV of both sides is a device's: the device moves it, the host reads the guard.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cstring>
#include <filesystem>
#include <memory>
#include <optional>
#include <thread>

#include "tests/common/fake_device.h"
#include "tests/transport/owner_fixture.h"

namespace kvrelay::transport {
namespace {

using std::chrono::milliseconds;
using std::chrono::seconds;
using testing::HasSubstr;
using tests::FakeDevice;

class MappedDeviceTest : public OwnerTest {
 protected:
  static constexpr uint64_t kKvBytes = 1 << 20;

  MappedDeviceTest() : OwnerTest("mapped", kKvBytes) {
    owner_ = MakeNode();
    reader_ = MakeNode();
    owner_->Fill(1);
    owner_->StartLease(3);
    peer_ = reader_->Connect(owner_->Spec("owner")).value_or(0);
  }
  std::unique_ptr<Node> MakeNode() {
    return std::make_unique<Node>("mapped", dir_.path(), kKvBytes, [this](Options& options) {
      options.regions[kKv].device = DeviceKind::kCuda;
      device_->Adopt(options.regions[kKv].data, kKvBytes);
      options.device = device_;
      options.throttle = throttle_;
      options.max_mapped_bytes = max_mapped_bytes_;
    });
  }
  // Begins to read everything, and waits until the device has it in work.
  OpId StartHeld(std::optional<Completion>& done, Terms terms = In(seconds(60))) {
    device_->Hold();
    const OpId op = reader_->transport().Read(peer_, Whole(Contiguous(0, kKvBytes)), Node::guard(3),
                                              terms, [&](Completion c) { done = std::move(c); });
    EXPECT_TRUE(reader_->control().RunUntil([&] { return device_->begun() > 0; }));
    return op;
  }
  // Lets go in a while. The operation must not have completed before.
  Completion LetGoAndWait(std::optional<Completion>& done, Duration after = milliseconds(50)) {
    reader_->control().RunFor(after);
    EXPECT_FALSE(done.has_value()) << "while the device writes its destination";
    device_->LetGo();
    EXPECT_TRUE(reader_->control().RunUntil([&] { return done.has_value(); }));
    EXPECT_EQ(device_->ended(), device_->begun());
    return done.value_or(Completion{});
  }

  const std::shared_ptr<FakeDevice> device_ = std::make_shared<FakeDevice>();
  std::shared_ptr<Throttle> throttle_ =
      std::make_shared<Throttle>(Caps{.bytes_per_s = 0, .inflight_bytes = kKvBytes / 2});
  uint64_t max_mapped_bytes_ = 0;
  std::unique_ptr<Node> owner_;
  std::unique_ptr<Node> reader_;
  PeerHandle peer_ = 0;
};

TEST_F(MappedDeviceTest, ReadsDataBetweenTwoReadsOfTheGuard) {
  std::optional<Completion> done;
  StartHeld(done);
  EXPECT_EQ(throttle_->counts().inflight_bytes, kKvBytes) << "one piece goes whole, and alone";
  const Completion completion = LetGoAndWait(done);
  ASSERT_TRUE(completion.status.ok()) << completion.status.ToString();
  EXPECT_EQ(completion.bytes, kKvBytes);
  EXPECT_TRUE(GuardHolds(Lease(owner_->Spec(""), 3), completion.before, completion.after));
  EXPECT_EQ(reader_->FirstWrong(1, kKvBytes), std::nullopt);
  EXPECT_EQ(throttle_->counts().inflight_bytes, 0U);
  EXPECT_EQ(throttle_->counts().moved_bytes, kKvBytes);
}

TEST_F(MappedDeviceTest, AGuardThatChangesWhileTheDeviceCopiesIsSeen) {
  std::optional<Completion> done;
  StartHeld(done);
  owner_->record(3)->End();
  const Completion completion = LetGoAndWait(done);
  ASSERT_TRUE(completion.status.ok());
  EXPECT_FALSE(GuardHolds(Lease(owner_->Spec(""), 3), completion.before, completion.after));
}

TEST_F(MappedDeviceTest, SeveralPortionsAndReadsAtOnce) {
  constexpr uint64_t kPart = kKvBytes / 4;
  int completed = 0;
  for (uint64_t read = 0; read < 2; ++read) {
    auto next = [at = read * 2 * kPart,
                 end = (read + 1) * 2 * kPart](const GuardWords&) mutable -> Result<Portion> {
      const uint64_t begin = at;
      at += kPart / 2;
      return Portion{Contiguous(begin, kPart / 2), at == end};
    };
    reader_->transport().Read(peer_, next, Node::guard(3), In(seconds(60)),
                              [&](const Completion& c) {
                                EXPECT_TRUE(c.status.ok()) << c.status.ToString();
                                EXPECT_EQ(c.bytes, 2 * kPart);
                                ++completed;
                              });
  }
  ASSERT_TRUE(reader_->control().RunUntil([&] { return completed == 2; }));
  EXPECT_EQ(device_->begun(), 8U);
  EXPECT_EQ(reader_->FirstWrong(1, kKvBytes), std::nullopt);
}

TEST_F(MappedDeviceTest, SmallReadsGoByTheDeviceToo) {
  EXPECT_FALSE(reader_->transport().ReadNow(peer_, Contiguous(0, 64), Node::guard(3)).has_value());
  EXPECT_TRUE(Read(*reader_, peer_, Contiguous(0, 64), Node::guard(3)).status.ok());
  EXPECT_EQ(device_->ended(), 1U);
}

TEST_F(MappedDeviceTest, ABegunReadIsItsCallersToLookAt) {
  const CopyPlan plan = Contiguous(0, kKvBytes);
  const GuardExpectation want = Lease(owner_->Spec(""), 3);
  EXPECT_FALSE(reader_->transport().begins()) << "under a cap";
  EXPECT_EQ(reader_->transport().Begin(peer_, plan, Node::guard(3), want), nullptr);
  throttle_.reset();
  reader_ = MakeNode();
  peer_ = reader_->Connect(owner_->Spec("owner")).value_or(0);
  Transport& transport = reader_->transport();
  ASSERT_TRUE(transport.begins());
  EXPECT_EQ(transport.Begin(peer_ + 1, plan, Node::guard(3), want), nullptr);
  EXPECT_EQ(transport.Begin(peer_, Contiguous(64, kKvBytes), Node::guard(3), want), nullptr);
  EXPECT_EQ(transport.Begin(peer_, plan, Node::guard(3), Lease(owner_->Spec(""), 3, 101)), nullptr)
      << "not computed yet";
  EXPECT_EQ(device_->begun(), 0U);

  device_->Hold();
  auto read = transport.Begin(peer_, plan, Node::guard(3), want);
  ASSERT_NE(read, nullptr);
  EXPECT_EQ(device_->begun(), 1U);
  EXPECT_FALSE(read->Look().has_value());
  device_->LetGo();
  const auto completion = read->Look();
  ASSERT_TRUE(completion.has_value());
  EXPECT_TRUE(completion->status.ok());
  EXPECT_EQ(completion->bytes, kKvBytes);
  EXPECT_TRUE(GuardHolds(want, completion->before, completion->after));
  EXPECT_EQ(reader_->FirstWrong(1, kKvBytes), std::nullopt);

  device_->Hold();
  read = transport.Begin(peer_, plan, Node::guard(3), want);
  ASSERT_NE(read, nullptr);
  owner_->record(3)->End();
  owner_.reset();  // its memory stays until the device has read it
  reader_->DestroyTransport();
  device_->LetGo();
  const auto late = read->Look();
  ASSERT_TRUE(late.has_value());
  EXPECT_FALSE(GuardHolds(want, late->before, late->after));
}

TEST_F(MappedDeviceTest, CancelledReadsEndWhenTheDeviceHas) {
  std::optional<Completion> done;
  const OpId op = StartHeld(done);
  reader_->transport().Cancel(op);
  EXPECT_EQ(LetGoAndWait(done).status.code(), Code::kCancelled);
  // Nothing writes the destination any more.
  std::memset(reader_->kv(), 0x5a, kKvBytes);
  reader_->control().RunFor(milliseconds(20));
  for (uint64_t i = 0; i < kKvBytes; ++i) ASSERT_EQ(reader_->kv()[i], std::byte{0x5a});
  EXPECT_EQ(throttle_->counts().inflight_bytes, 0U);
}

TEST_F(MappedDeviceTest, ADeadlineEndsAReadWhenTheDeviceHas) {
  std::optional<Completion> done;
  StartHeld(done, In(milliseconds(20)));
  // Long enough that the transfer thread has seen the deadline pass.
  EXPECT_EQ(LetGoAndWait(done, milliseconds(500)).status.code(), Code::kDeadlineExceeded);
}

TEST_F(MappedDeviceTest, AnOwnersMemoryStaysUntilTheDeviceHasReadIt) {
  std::optional<Completion> done;
  StartHeld(done);
  owner_.reset();  // the fake would read unmapped pages
  EXPECT_EQ(LetGoAndWait(done).status.code(), Code::kPeerUnreachable);
  EXPECT_EQ(reader_->FirstWrong(1, kKvBytes), std::nullopt);
}

TEST_F(MappedDeviceTest, ADevicesFailureFailsTheReadAndNothingElse) {
  device_->FailNext(Status(Code::kInternal, "an illegal address"));
  const Completion failed = Read(*reader_, peer_, Contiguous(0, kKvBytes), Node::guard(3));
  EXPECT_EQ(failed.status.code(), Code::kInternal);
  EXPECT_THAT(failed.status.message(), HasSubstr("an illegal address"));
  EXPECT_EQ(failed.bytes, 0U);
  EXPECT_EQ(throttle_->counts().inflight_bytes, 0U);
  EXPECT_TRUE(Read(*reader_, peer_, Contiguous(0, kKvBytes), Node::guard(3)).status.ok());
}

TEST_F(MappedDeviceTest, DestructionWaitsForTheDevice) {
  std::optional<Completion> done;
  StartHeld(done);
  std::thread later([&] {
    std::this_thread::sleep_for(milliseconds(50));
    device_->LetGo();
  });
  reader_->DestroyTransport();
  EXPECT_EQ(device_->ended(), device_->begun());
  later.join();
  ASSERT_TRUE(reader_->control().RunUntil([&] { return done.has_value(); }));
  EXPECT_EQ(done->status.code(), Code::kCancelled);
}

TEST_F(MappedDeviceTest, NobodyWaitsWhileAnotherPeersMemoryIsMapped) {
  const auto other = MakeNode();
  std::optional<Result<PeerHandle>> connected;
  device_->HoldMapping();
  reader_->transport().Connect(
      other->Spec("other"), In(seconds(60)),
      [&](Result<PeerHandle> peer) { connected = std::move(peer); }, [] {});
  for (int i = 0; i < 20; ++i) {
    EXPECT_TRUE(Read(*reader_, peer_, Contiguous(0, 4096), Node::guard(3)).status.ok());
    reader_->control().RunFor(milliseconds(1));
  }
  EXPECT_FALSE(connected.has_value());
  device_->LetGoMapping();
  ASSERT_TRUE(reader_->control().RunUntil([&] { return connected.has_value(); }));
  EXPECT_TRUE(connected->has_value()) << connected->error().ToString();
}

TEST_F(MappedDeviceTest, AnOwnerThatEndsWhileItsMemoryIsMappedIsNoPeer) {
  auto other = MakeNode();
  std::optional<Result<PeerHandle>> connected;
  device_->HoldMapping();
  reader_->transport().Connect(
      other->Spec("other"), In(seconds(60)),
      [&](Result<PeerHandle> peer) { connected = std::move(peer); }, [] {});
  reader_->control().RunFor(milliseconds(20));
  other.reset();
  ASSERT_TRUE(reader_->control().RunUntil([&] { return connected.has_value(); }));
  ASSERT_FALSE(connected->has_value());
  EXPECT_EQ(connected->error().code(), Code::kPeerUnreachable);
  device_->LetGoMapping();
  reader_->control().RunFor(milliseconds(50));
  EXPECT_EQ(device_->mapped(), 1U) << "the first owner's";
}

TEST_F(MappedDeviceTest, LetsGoOfWhatWasReadTheLongestTimeAgo) {
  max_mapped_bytes_ = 2 * (kKvBytes + 4096);
  reader_ = MakeNode();
  const auto connect = [&](const Node& owner, bool& gone) {
    return reader_->Connect(owner.Spec("owner"), [&gone] { gone = true; }).value_or(0);
  };
  const auto reads = [&](PeerHandle peer) {
    return Read(*reader_, peer, Contiguous(0, 4096), Node::guard(3)).status.code();
  };
  bool gone[3] = {};
  const auto second = MakeNode();
  const auto third = MakeNode();
  const PeerHandle a = connect(*owner_, gone[0]);
  const PeerHandle b = connect(*second, gone[1]);
  EXPECT_EQ(reads(b), Code::kOk);
  EXPECT_EQ(reads(a), Code::kOk);
  const PeerHandle c = connect(*third, gone[2]);
  ASSERT_TRUE(reader_->control().RunUntil([&] { return gone[1]; }));
  EXPECT_EQ(reads(a), Code::kOk);
  EXPECT_EQ(reads(b), Code::kPeerUnreachable);
  EXPECT_EQ(reads(c), Code::kOk);
  ASSERT_TRUE(reader_->control().RunUntil([&] { return device_->mapped() == 2; }));

  // One that is being read stays, whatever was read after it.
  std::optional<Completion> done;
  device_->Hold();
  reader_->transport().Read(a, Whole(Contiguous(0, 4096)), Node::guard(3), In(seconds(60)),
                            [&](Completion completion) { done = std::move(completion); });
  reader_->control().RunFor(milliseconds(20));
  bool gone_again = false;
  const PeerHandle again = connect(*second, gone_again);
  ASSERT_TRUE(reader_->control().RunUntil([&] { return gone[2]; }));
  device_->LetGo();
  ASSERT_TRUE(reader_->control().RunUntil([&] { return done.has_value(); }));
  EXPECT_TRUE(done->status.ok()) << done->status.ToString();
  EXPECT_EQ(reads(again), Code::kOk);
  EXPECT_FALSE(gone[0] || gone_again);
}

TEST_F(MappedDeviceTest, OwnersThatComeAndGoLeaveNothingMapped) {
  reader_ = MakeNode();
  owner_.reset();
  const auto descriptors = [] {
    return std::distance(std::filesystem::directory_iterator("/proc/self/fd"),
                         std::filesystem::directory_iterator());
  };
  const auto before = descriptors();
  for (int round = 0; round < 100; ++round) {
    const auto owner = MakeNode();
    owner->StartLease(3);
    bool gone = false;
    const auto peer = reader_->Connect(owner->Spec("owner"), [&] { gone = true; });
    ASSERT_TRUE(peer.has_value()) << peer.error().ToString();
    for (int i = 0; i < 100; ++i) {
      ASSERT_TRUE(Read(*reader_, *peer, Contiguous(0, 4096), Node::guard(3)).status.ok());
    }
    owner->DestroyTransport();
    ASSERT_TRUE(reader_->control().RunUntil([&] { return gone; }, seconds(1)));
    ASSERT_TRUE(reader_->control().RunUntil([&] { return device_->mapped() == 0; }, seconds(1)));
  }
  EXPECT_EQ(descriptors(), before);
}

TEST_F(MappedDeviceTest, ReadsTheHostsMemoryOnceItIsPinned) {
  auto host = std::make_unique<Node>("mapped", dir_.path(), kKvBytes);
  host->Fill(2);
  host->StartLease(3);
  const auto peer = reader_->Connect(host->Spec("host"));
  ASSERT_TRUE(peer.has_value()) << peer.error().ToString();
  EXPECT_EQ(device_->pinned(), 2U) << "KV and records";
  const Completion completion = Read(*reader_, *peer, Contiguous(0, kKvBytes), Node::guard(3));
  ASSERT_TRUE(completion.status.ok()) << completion.status.ToString();
  EXPECT_TRUE(GuardHolds(Lease(host->Spec(""), 3), completion.before, completion.after));
  EXPECT_EQ(reader_->FirstWrong(2, kKvBytes), std::nullopt);
  EXPECT_EQ(device_->ended(), 1U);
  host.reset();
  EXPECT_TRUE(reader_->control().RunUntil([&] { return device_->pinned() == 0; }))
      << "an ended owner's memory is let go";
}

TEST_F(MappedDeviceTest, SaysWhyMemoryOfTwoKindsDoesNotMeet) {
  Node host("mapped", dir_.path(), kKvBytes);
  EXPECT_THAT(WhyNot(host, owner_->Spec("owner")), HasSubstr("region 0: it is a GPU's memory"));
  device_->RefuseToPin();
  EXPECT_THAT(WhyNot(*reader_, host.Spec("host")),
              HasSubstr("region 0 is the host's memory: fake:0 cannot pin"));
}

}  // namespace
}  // namespace kvrelay::transport
