// Packed streams where the KV of one side or both is a device's: it packs into pinned memory of the
// host's and unpacks from it.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cstring>
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

class PackedDeviceTest : public testing::Test {
 protected:
  static constexpr uint64_t kChunk = 16 << 10;
  static constexpr uint32_t kChunks = 40;
  static constexpr uint64_t kKvBytes = kChunk * kChunks;

  std::unique_ptr<Node> MakeNode(const std::shared_ptr<FakeDevice>& device) {
    return std::make_unique<Node>("ucx-rail", "", kKvBytes, [&](Options& options) {
      options.chunk_bytes = kChunk;
      options.throttle = throttle_;
      if (device == nullptr) return;
      options.regions[kKv].device = DeviceKind::kCuda;
      device->Adopt(options.regions[kKv].data, kKvBytes);
      options.device = device;
    });
  }
  // Null: that side's KV is the host's.
  void Open(const std::shared_ptr<FakeDevice>& owner, const std::shared_ptr<FakeDevice>& reader) {
    owner_ = MakeNode(owner);
    reader_ = MakeNode(reader);
    owner_->Fill(1);
    owner_->StartLease(0);
    const auto peer = reader_->Connect(owner_->Spec("owner"));
    ASSERT_TRUE(peer.has_value()) << peer.error().ToString();
    peer_ = *peer;
  }
  // Begins a stream of everything; its ends are in sent_ and received_.
  void Start(Duration timeout = seconds(60)) {
    sent_.reset();
    received_.reset();
    ++stream_;
    const GuardExpectation want = Lease(owner_->Spec(""), 0);
    receive_ = reader_->transport().StartPackedReceive(
        peer_, stream_, ReceivePlan(kChunks, kChunk), want, In(timeout),
        [this](Completion completion) { received_ = std::move(completion); });
    send_ = owner_->transport().StartPackedSend(
        reader_->Spec("reader"), stream_, SendPlan(kChunks, kChunk), owner_->record(0), want,
        In(timeout), [this](Completion completion) { sent_ = std::move(completion); });
  }
  bool RunUntil(const std::function<bool()>& done) {
    return reader_->control().RunUntil([&] {
      owner_->control().RunFor(milliseconds(1));
      return done();
    });
  }
  bool BothEnd() {
    return RunUntil([&] { return sent_ && received_; });
  }
  void RunFor(Duration time) {
    const TimePoint end = In(time);
    RunUntil([&] { return std::chrono::steady_clock::now() >= end; });
  }
  void ExpectAllCame() {
    Start();
    ASSERT_TRUE(BothEnd());
    ASSERT_TRUE(sent_->status.ok()) << sent_->status.ToString();
    ASSERT_TRUE(received_->status.ok()) << received_->status.ToString();
    EXPECT_EQ(received_->bytes, kKvBytes);
    EXPECT_TRUE(GuardHolds(Lease(owner_->Spec(""), 0), received_->before, received_->after));
    EXPECT_EQ(reader_->FirstWrong(1, kKvBytes), std::nullopt);
    EXPECT_TRUE(RunUntil([&] { return CountersOf(*owner_)["slots_in_use"] == 0; }));
    EXPECT_EQ(throttle_->counts().inflight_bytes, 0U);
  }

  const std::shared_ptr<FakeDevice> owners_ = std::make_shared<FakeDevice>();
  const std::shared_ptr<FakeDevice> readers_ = std::make_shared<FakeDevice>();
  const std::shared_ptr<Throttle> throttle_ =
      std::make_shared<Throttle>(Caps{.bytes_per_s = 0, .inflight_bytes = kKvBytes});
  std::unique_ptr<Node> owner_;
  std::unique_ptr<Node> reader_;
  PeerHandle peer_ = 0;
  StreamId stream_ = 0;
  OpId send_ = 0;
  OpId receive_ = 0;
  std::optional<Completion> sent_;
  std::optional<Completion> received_;
};

TEST_F(PackedDeviceTest, StreamsFromAndToDevicesAndTheHost) {
  Open(owners_, readers_);
  ExpectAllCame();
  EXPECT_EQ(owners_->ended(), kChunks);
  EXPECT_EQ(readers_->ended(), kChunks);
  EXPECT_EQ(reader_->transport().lanes(), "pinned host memory");
  Open(owners_, nullptr);
  ExpectAllCame();
  Open(nullptr, readers_);
  ExpectAllCame();
  EXPECT_EQ(owners_->ended(), 2 * kChunks);
  EXPECT_EQ(readers_->ended(), 2 * kChunks);
  reader_.reset();
  owner_.reset();
  EXPECT_EQ(owners_->pinned() + readers_->pinned(), 0U);
}

TEST_F(PackedDeviceTest, ALeaseThatEndsWhileADevicePacksIsSeen) {
  Open(owners_, nullptr);
  owners_->Hold();
  Start();
  ASSERT_TRUE(RunUntil([&] { return owners_->begun() > 1; })) << "chunks are packed side by side";
  owner_->record(0)->End();
  owners_->LetGo();
  ASSERT_TRUE(BothEnd());
  EXPECT_EQ(sent_->status.code(), Code::kStaleRead);
  EXPECT_EQ(received_->status.code(), Code::kStaleRead);
  EXPECT_EQ(received_->bytes, 0U);
  owner_->StartLease(0);
  ExpectAllCame();
}

TEST_F(PackedDeviceTest, ACancelledSendEndsWhenTheDeviceHas) {
  Open(owners_, nullptr);
  owners_->Hold();
  Start();
  ASSERT_TRUE(RunUntil([&] { return owners_->begun() > 0; }));
  owner_->transport().Cancel(send_);
  RunFor(milliseconds(50));
  EXPECT_FALSE(sent_.has_value()) << "while the device reads the KV";
  owners_->LetGo();
  ASSERT_TRUE(BothEnd());
  EXPECT_EQ(sent_->status.code(), Code::kCancelled);
  EXPECT_EQ(owners_->ended(), owners_->begun());
  EXPECT_EQ(received_->status.code(), Code::kPeerUnreachable) << "the owner said that it stops";
  ExpectAllCame();
}

TEST_F(PackedDeviceTest, ACancelledReceiveEndsWhenTheDeviceHas) {
  Open(nullptr, readers_);
  readers_->Hold();
  Start();
  ASSERT_TRUE(RunUntil([&] { return readers_->begun() > 0; }));
  reader_->transport().Cancel(receive_);
  RunFor(milliseconds(50));
  EXPECT_FALSE(received_.has_value()) << "while the device writes the KV";
  readers_->LetGo();
  ASSERT_TRUE(RunUntil([&] { return received_.has_value(); }));
  EXPECT_EQ(received_->status.code(), Code::kCancelled);
  EXPECT_EQ(readers_->ended(), readers_->begun());
  std::memset(reader_->kv(), 0x5a, kKvBytes);
  ASSERT_TRUE(BothEnd());
  for (uint64_t i = 0; i < kKvBytes; ++i) ASSERT_EQ(reader_->kv()[i], std::byte{0x5a});
  ExpectAllCame();
}

TEST_F(PackedDeviceTest, ADevicesFailureFailsTheStreamAndNothingElse) {
  Open(owners_, readers_);
  owners_->FailNext(Status(Code::kInternal, "an illegal address"));
  Start();
  ASSERT_TRUE(BothEnd());
  EXPECT_THAT(sent_->status.ToString(), HasSubstr("kInternal: an illegal address"));
  EXPECT_EQ(received_->status.code(), Code::kPeerUnreachable);
  ExpectAllCame();

  readers_->FailNext(Status(Code::kInternal, "out of something"));
  Start();
  ASSERT_TRUE(BothEnd());
  EXPECT_THAT(received_->status.ToString(), HasSubstr("kInternal: owner: out of something"));
  ExpectAllCame();
}

TEST_F(PackedDeviceTest, ABusyDeviceKeepsChunksWaiting) {
  Open(nullptr, readers_);
  readers_->Hold();
  Start();
  RunFor(milliseconds(100));
  EXPECT_FALSE(received_.has_value());
  EXPECT_LE(readers_->begun(), 8U) << "no more than is staged";
  readers_->LetGo();
  ASSERT_TRUE(BothEnd());
  EXPECT_TRUE(received_->status.ok()) << received_->status.ToString();
  EXPECT_EQ(reader_->FirstWrong(1, kKvBytes), std::nullopt);
}

TEST_F(PackedDeviceTest, DestructionWaitsForTheDevices) {
  Open(owners_, nullptr);
  owners_->Hold();
  Start();
  ASSERT_TRUE(RunUntil([&] { return owners_->begun() > 0; }));
  std::thread later([&] {
    std::this_thread::sleep_for(milliseconds(50));
    owners_->LetGo();
  });
  owner_->DestroyTransport();
  EXPECT_EQ(owners_->ended(), owners_->begun());
  later.join();
  ASSERT_TRUE(RunUntil([&] { return sent_.has_value(); }));
  EXPECT_EQ(sent_->status.code(), Code::kCancelled);
  ASSERT_TRUE(RunUntil([&] { return received_.has_value(); }));
}

TEST_F(PackedDeviceTest, ADeviceThatPinsNothingIsNoWay) {
  owners_->RefuseToPin();
  Options options;
  options.executor = [](auto) {};
  options.device = owners_;
  const auto none = CreateUcxPacked(options);
  ASSERT_FALSE(none.has_value());
  EXPECT_THAT(none.error().ToString(), HasSubstr("kRefused: fake:0 cannot pin"));
}

}  // namespace
}  // namespace kvrelay::transport
