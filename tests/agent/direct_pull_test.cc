// Pulls on the calling thread between two engines of one rank each, in one process, on real sockets
// and mapped memory. Small ones are here when the call that says so returns, those of a device are
// under way by then, where that can be; and right where it cannot.
#include "agent/direct_pull.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <chrono>
#include <cstring>
#include <future>
#include <memory>
#include <optional>
#include <string>
#include <thread>
#include <vector>

#include "agent/engine_agent.h"
#include "tests/common/fake_device.h"
#include "tests/common/temp_dir.h"

namespace kvrelay::agent {
namespace {

class Engine {
 public:
  static constexpr uint32_t kBlockSize = 16;
  static constexpr uint32_t kBlocks = 16;
  static constexpr uint64_t kBlockBytes = 4096;

  // `device`: of its KV; null: the host's.
  Engine(const std::string& run_dir, transport::Caps caps, std::shared_ptr<Device> device)
      : device_(device) {
    const KvShard shard = KvShard::Make(1, 1, 1, 0).value();
    const KvLayout layout =
        KvLayout::Dense(KvFormat::kNhd, DType::kFp32, 1, 1, 32, kBlockSize, kBlocks);
    EXPECT_EQ(layout.dense_bytes(), kBlocks * kBlockBytes);
    kv_.emplace((device == nullptr ? Region::AllocateHost(layout.dense_bytes(), "test")
                                   : device->Allocate(layout.dense_bytes(), "test"))
                    .value());
    EngineAgentOptions options;
    options.model.bytes[0] = 7;
    options.block_size = kBlockSize;
    options.transport = "mapped";
    options.run_dir = run_dir;
    options.caps = caps;
    auto made = EngineAgent::Create(options, {{layout, shard, {&*kv_}, device}}, pool, prefixes_);
    EXPECT_TRUE(made.has_value()) << made.error().ToString();
    agent = std::move(*made);
    agent->Run();
  }
  ~Engine() { agent->Shutdown(); }

  // On the control thread; returns when it has run.
  void Do(const std::function<void()>& fn) {
    std::promise<void> done;
    agent->Post([&] {
      fn();
      done.set_value();
    });
    done.get_future().wait();
  }
  uint64_t ClaimsHeld() {
    std::promise<uint64_t> held;
    agent->Post([&] {
      agent->Describe([&held](const EngineSnapshot& all) { held.set_value(all.claims_held); });
    });
    return held.get_future().get();
  }
  // Both halves of the block: K and V.
  std::vector<std::byte> Bytes(BlockId block) const {
    std::vector<std::byte> bytes;
    for (const uint64_t half : {uint64_t{0}, kBlocks * kBlockBytes / 2}) {
      const std::byte* const from = kv_->data() + half + block * kBlockBytes / 2;
      bytes.insert(bytes.end(), from, from + kBlockBytes / 2);
    }
    return bytes;
  }
  void Fill(BlockId block, int byte) {
    for (const uint64_t half : {uint64_t{0}, kBlocks * kBlockBytes / 2}) {
      std::memset(kv_->data() + half + block * kBlockBytes / 2, byte, kBlockBytes / 2);
    }
  }

  std::shared_ptr<BlockPool> pool = BlockPool::Create(kBlocks);

 private:
  const std::shared_ptr<Device> device_;  // outlives the KV
  std::optional<Region> kv_;
  SystemPrefixStore prefixes_{1};

 public:
  std::unique_ptr<EngineAgent> agent;  // goes before what it uses
};

class DirectPullTest : public testing::Test {
 protected:
  void Open(transport::Caps reader_caps = {}, std::shared_ptr<Device> device = nullptr) {
    owner_ = std::make_unique<Engine>(folder_.path(), transport::Caps{}, device);
    reader_ = std::make_unique<Engine>(folder_.path(), reader_caps, device);
  }

  // A prompt of one block.
  proto::Ticket Offer(int byte, bool computed = true) {
    BlockTable blocks = owner_->pool->Allocate(1).value();
    owner_->Fill(blocks.blocks()[0], byte);
    std::promise<Result<LeaseId>> offered;
    owner_->Do([&] {
      OfferRequest offer;
      offer.blocks = {std::move(blocks), 0};
      offer.tokens = Engine::kBlockSize;
      offer.hash.bytes[0] = 9;
      offer.finished = computed;
      owner_->agent->owner().Offer(
          std::move(offer), [&offered](const Result<LeaseId>& lease) { offered.set_value(lease); });
    });
    const LeaseId lease = offered.get_future().get().value();
    if (computed) Publish(lease);
    proto::Ticket ticket{
        .owner = owner_->agent->engine(),
        .incarnation = owner_->agent->incarnation(),
        .front = owner_->agent->endpoint(),
        .model = owner_->agent->model(),
        .prompt = {.lease = lease, .hash = {}, .first_token = 0, .tokens = Engine::kBlockSize},
        .prefixes = {}};
    ticket.prompt.hash.bytes[0] = 9;
    return ticket;
  }
  void Publish(const LeaseId& lease) {
    owner_->agent->Writer(0, lease)->Publish(
        {.tokens = Engine::kBlockSize, .chunk_end = Engine::kBlockSize, .layers = 0});
  }

  struct Loading {
    BlockId block = 0;
    std::weak_ptr<Load> load;
    std::optional<Result<LoadResult>> result;  // the control thread's
    std::promise<void> drained;
  };
  // Returns when the lease is claimed, so that only the pull is left.
  std::shared_ptr<Loading> Claim(const proto::Ticket& ticket) {
    const auto loading = std::make_shared<Loading>();
    BlockTable blocks = reader_->pool->Allocate(1).value();
    loading->block = blocks.blocks()[0];
    reader_->Fill(loading->block, 0);
    reader_->Do([&] {
      loading->load = reader_->agent->StartLoad(
          {.ticket = ticket,
           .blocks = {std::move(blocks), 0},
           .deadline = reader_->agent->env().clock.Now() + std::chrono::seconds(30)},
          {.finished =
               [loading](Result<LoadResult> result) { loading->result = std::move(result); },
           .drained = [loading] { loading->drained.set_value(); }});
    });
    const auto end = std::chrono::steady_clock::now() + std::chrono::seconds(20);
    while (reader_->ClaimsHeld() == 0 && std::chrono::steady_clock::now() < end) {
      std::this_thread::sleep_for(Millis(1));
    }
    EXPECT_EQ(reader_->ClaimsHeld(), 1U);
    return loading;
  }
  // SetReady, then `fn` in the same callback. Whether the bytes were there in between.
  bool ReadyAtOnce(Loading& loading, int byte, const std::function<void(Load&)>& fn = {}) {
    bool here = false;
    reader_->Do([&] {
      const auto load = loading.load.lock();
      load->SetReady();
      here = Holds(loading, byte);
      EXPECT_FALSE(loading.result.has_value()) << "never inside the call";
      if (fn) fn(*load);
    });
    return here;
  }
  Result<LoadResult> Wait(Loading& loading) {
    EXPECT_EQ(loading.drained.get_future().wait_for(std::chrono::seconds(20)),
              std::future_status::ready);
    std::optional<Result<LoadResult>> result;
    reader_->Do([&] { result = loading.result; });
    return result.value_or(Error(Code::kInternal, "no result"));
  }
  bool Holds(const Loading& loading, int byte) const {
    return std::ranges::all_of(reader_->Bytes(loading.block),
                               [&](std::byte b) { return b == static_cast<std::byte>(byte); });
  }
  double Pulls() const {
    return reader_->agent->counters().Get("kvrelay_pulls_total{path=\"mapped\",outcome=\"ok\"}");
  }
  // One load, so that the peers know each other.
  void Meet() {
    const auto first = Claim(Offer(1));
    EXPECT_FALSE(ReadyAtOnce(*first, 1)) << "they have not shaken hands yet";
    const auto loaded = Wait(*first);
    ASSERT_TRUE(loaded.has_value()) << loaded.error().ToString();
    EXPECT_TRUE(Holds(*first, 1));
  }

  const tests::TempDir folder_;
  std::unique_ptr<Engine> owner_;
  std::unique_ptr<Engine> reader_;
};

TEST_F(DirectPullTest, WhatIsComputedIsHereWhenTheCallReturns) {
  Open();
  Meet();
  for (const int byte : {2, 3}) {
    const auto loading = Claim(Offer(byte));
    EXPECT_TRUE(ReadyAtOnce(*loading, byte));
    const auto loaded = Wait(*loading);
    ASSERT_TRUE(loaded.has_value()) << loaded.error().ToString();
    EXPECT_EQ(loaded->own.path, "mapped");
    EXPECT_EQ(loaded->own.bytes, Engine::kBlockBytes);
    EXPECT_EQ(Pulls(), byte);
    EXPECT_EQ(reader_->pool->used_blocks(), 0U);
    EXPECT_EQ(reader_->ClaimsHeld(), 0U);
  }
}

TEST_F(DirectPullTest, ItsTimeIsTheCopysNotItsReports) {
  Open();
  Meet();
  const auto loading = Claim(Offer(2));
  ReadyAtOnce(*loading, 2, [](Load&) { std::this_thread::sleep_for(Millis(200)); });
  const auto loaded = Wait(*loading);
  ASSERT_TRUE(loaded.has_value()) << loaded.error().ToString();
  EXPECT_LT(loaded->own.pull_ms, 200);
}

TEST_F(DirectPullTest, WhatIsNotComputedComesWhenItIs) {
  Open();
  Meet();
  const proto::Ticket ticket = Offer(2, /*computed=*/false);
  const auto loading = Claim(ticket);
  ReadyAtOnce(*loading, 2);
  std::this_thread::sleep_for(Millis(5));
  reader_->Do([&] { EXPECT_FALSE(loading->result.has_value()); });
  Publish(ticket.prompt.lease);
  const auto loaded = Wait(*loading);
  ASSERT_TRUE(loaded.has_value()) << loaded.error().ToString();
  EXPECT_TRUE(Holds(*loading, 2));
  EXPECT_EQ(Pulls(), 2);
}

TEST_F(DirectPullTest, ALeaseThatEndedServesNothing) {
  Open();
  Meet();
  const proto::Ticket ticket = Offer(2);
  const auto loading = Claim(ticket);
  owner_->Do([&] { owner_->agent->owner().Withdraw(ticket.prompt.lease, "test"); });
  const auto end = std::chrono::steady_clock::now() + std::chrono::seconds(20);
  while (owner_->pool->used_blocks() > 0 && std::chrono::steady_clock::now() < end) {
    std::this_thread::sleep_for(Millis(1));
  }
  ReadyAtOnce(*loading, 2);
  EXPECT_FALSE(Wait(*loading).has_value());
  EXPECT_EQ(Pulls(), 1);
}

TEST_F(DirectPullTest, CancelledRightAfterItIsCancelled) {
  Open();
  Meet();
  const auto loading = Claim(Offer(2));
  EXPECT_TRUE(ReadyAtOnce(*loading, 2, [](Load& load) {
    load.Cancel({Code::kCancelled, "the user left"});
  }));
  const auto loaded = Wait(*loading);
  ASSERT_FALSE(loaded.has_value());
  EXPECT_EQ(loaded.error().code(), Code::kCancelled);
  EXPECT_EQ(reader_->pool->used_blocks(), 0U);
}

TEST_F(DirectPullTest, UnderACapItWaitsForItsTurn) {
  Open({.bytes_per_s = 100 << 20});
  Meet();
  const auto loading = Claim(Offer(2));
  EXPECT_FALSE(ReadyAtOnce(*loading, 2));
  const auto loaded = Wait(*loading);
  ASSERT_TRUE(loaded.has_value()) << loaded.error().ToString();
  EXPECT_TRUE(Holds(*loading, 2));
}

// The KV of both is a device's, which is at a pull as long as the test wants.
class DevicePullTest : public DirectPullTest {
 protected:
  void SetUp() override {
    Open({}, device_);
    Meet();
    met_ = device_->begun();
  }
  // A pull that the device has begun when this returns.
  std::shared_ptr<Loading> StartHeld(const proto::Ticket& ticket) {
    auto loading = Claim(ticket);
    device_->Hold();
    ReadyAtOnce(*loading, 2);
    EXPECT_EQ(device_->begun(), met_ + 1) << "by the call that says that bytes may move";
    std::this_thread::sleep_for(Millis(20));  // past the time in which it is looked at always
    reader_->Do([&] { EXPECT_FALSE(loading->result.has_value()); });
    return loading;
  }

  const std::shared_ptr<tests::FakeDevice> device_ = std::make_shared<tests::FakeDevice>();
  uint64_t met_ = 0;  // what it had begun when the peers knew each other
};

TEST_F(DevicePullTest, IsUnderWayWhenTheCallReturns) {
  const auto loading = StartHeld(Offer(2));
  device_->LetGo();
  const auto loaded = Wait(*loading);
  ASSERT_TRUE(loaded.has_value()) << loaded.error().ToString();
  EXPECT_TRUE(Holds(*loading, 2));
  EXPECT_EQ(loaded->own.path, "mapped");
  EXPECT_EQ(loaded->own.bytes, Engine::kBlockBytes);
  EXPECT_EQ(Pulls(), 2);
  EXPECT_EQ(device_->begun(), met_ + 1);
}

TEST_F(DevicePullTest, WhatIsNotComputedComesWhenItIs) {
  const proto::Ticket ticket = Offer(2, /*computed=*/false);
  const auto loading = Claim(ticket);
  ReadyAtOnce(*loading, 2);
  std::this_thread::sleep_for(Millis(5));
  EXPECT_EQ(device_->begun(), met_) << "nothing moves that would be thrown away";
  Publish(ticket.prompt.lease);
  const auto loaded = Wait(*loading);
  ASSERT_TRUE(loaded.has_value()) << loaded.error().ToString();
  EXPECT_TRUE(Holds(*loading, 2));
}

TEST_F(DevicePullTest, ALeaseThatEndsMeanwhileServesNothing) {
  const proto::Ticket ticket = Offer(2);
  const auto loading = StartHeld(ticket);
  owner_->Do([&] { owner_->agent->owner().Withdraw(ticket.prompt.lease, "test"); });
  const auto end = std::chrono::steady_clock::now() + std::chrono::seconds(20);
  while (owner_->pool->used_blocks() > 0 && std::chrono::steady_clock::now() < end) {
    std::this_thread::sleep_for(Millis(1));
  }
  device_->LetGo();
  EXPECT_FALSE(Wait(*loading).has_value());
  EXPECT_EQ(Pulls(), 1);
}

TEST_F(DevicePullTest, CancelledItKeepsItsBlocksUntilTheDeviceIsDone) {
  const auto loading = StartHeld(Offer(2));
  reader_->Do([&] { loading->load.lock()->Cancel({Code::kCancelled, "the user left"}); });
  std::this_thread::sleep_for(Millis(20));
  reader_->Do([&] {
    ASSERT_TRUE(loading->result.has_value()) << "its caller hears of it at once";
    EXPECT_EQ(loading->result->error().code(), Code::kCancelled);
  });
  EXPECT_EQ(reader_->pool->used_blocks(), 1U);
  device_->LetGo();
  EXPECT_FALSE(Wait(*loading).has_value());
  EXPECT_EQ(reader_->pool->used_blocks(), 0U);
  EXPECT_EQ(device_->ended(), device_->begun());
  // The blocks are others' now.
  reader_->Fill(loading->block, 9);
  std::this_thread::sleep_for(Millis(5));
  EXPECT_TRUE(Holds(*loading, 9));
}

TEST_F(DevicePullTest, WhatADeviceFailedIsPulledByItsRank) {
  device_->FailNext(Status(Code::kInternal, "an illegal address"));
  const auto loading = Claim(Offer(2));
  ReadyAtOnce(*loading, 2);
  const auto loaded = Wait(*loading);
  ASSERT_TRUE(loaded.has_value()) << loaded.error().ToString();
  EXPECT_TRUE(Holds(*loading, 2));
  EXPECT_EQ(device_->begun(), met_ + 2);
}

TEST_F(DevicePullTest, TheAgentsEndWaitsForTheDevice) {
  const auto loading = StartHeld(Offer(2));
  std::thread later([&] {
    std::this_thread::sleep_for(Millis(50));
    device_->LetGo();
  });
  reader_.reset();
  EXPECT_EQ(device_->ended(), device_->begun());
  later.join();
}

}  // namespace
}  // namespace kvrelay::agent
