// Caches that the network cannot reach: a fake device whose memory can only be touched inside the
// user's copy functions, any other access is a crash.
#include <gtest/gtest.h>
#include <sys/mman.h>

#include <chrono>
#include <cstring>
#include <functional>
#include <thread>

#include "agent/host_xfer_buffer.h"
#include "agent/kv_connector.h"
#include "base/mapping.h"
#include "base/random.h"
#include "kvcache/kv_view.h"
#include "tests/common/temp_dir.h"

namespace kvrelay::agent {
namespace {

class FakeDevice {
 public:
  explicit FakeDevice(uint64_t bytes)
      : memory_(Mapping::Map(bytes, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1).value()) {}
  // What a kernel would do.
  void Run(const std::function<void(std::byte* memory)>& kernel) {
    mprotect(memory_.data(), memory_.bytes(), PROT_READ | PROT_WRITE);
    kernel(memory_.data());
    mprotect(memory_.data(), memory_.bytes(), PROT_NONE);
  }
  // Copies blocks of every layer's K and V, each contiguous as in KvLayout::Dense.
  Status CopyBlocks(const HostXferRank& host, std::span<const BlockId> blocks, bool to_host) {
    Run([&](std::byte* device) {
      for (const auto* places : {&host.layout.k, &host.layout.v}) {
        for (const TensorPlace& place : *places) {
          for (const BlockId block : blocks) {
            const uint64_t at = place.offset + block * host.layout.block_stride;
            std::byte* on_host = host.regions[place.region] + at;
            std::byte* from = to_host ? device + at : on_host;
            std::byte* to = to_host ? on_host : device + at;
            std::memcpy(to, from, host.layout.block_stride);
          }
        }
      }
    });
    copied_blocks += blocks.size();
    return fail ? Status(Code::kInternal, "the device is gone") : Status::Ok();
  }

  size_t copied_blocks = 0;
  bool fail = false;

 private:
  Mapping memory_;
};

// One engine of one rank whose cache is on such a device.
struct DeviceEngine {
  static constexpr uint32_t kBlockSize = 16;
  static constexpr uint32_t kBlocks = 32;
  static constexpr uint32_t kTokens = 100;
  static constexpr uint32_t kPromptBlocks = (kTokens + kBlockSize - 1) / kBlockSize;

  DeviceEngine(KvFormat format, const std::string& transport, const std::string& run_dir)
      : layout(KvLayout::Dense(format, DType::kFp32, 2, 4, 8, kBlockSize, kBlocks)),
        device(layout.dense_bytes()) {
    host = HostXferBuffer::Initialize(
               {{layout, KvShard::Make(2, 4, 1, 0).value(), {layout.dense_bytes()}}})
               .value();
    host->SetOps({.d2h = [this](const auto& rank,
                                auto blocks) { return device.CopyBlocks(rank, blocks, true); },
                  .h2d = [this](const auto& rank,
                                auto blocks) { return device.CopyBlocks(rank, blocks, false); }});
    EngineAgentOptions options;
    options.model.bytes[0] = 7;
    options.block_size = kBlockSize;
    options.transport = transport;
    options.run_dir = run_dir;
    auto made = EngineAgent::Create(options, host->caches(), pool, prefixes);
    EXPECT_TRUE(made.has_value()) << made.error().ToString();
    agent = std::move(*made);
    connector = std::make_unique<KvConnector>(*agent, host.get());
    agent->Run();
  }
  ~DeviceEngine() { agent->Shutdown(); }

  // Calls visit(row, value that belongs there) for every row of the prompt, on the device.
  template <typename Visit>
  void ForEachRow(std::span<const BlockId> blocks, Visit visit) {
    device.Run([&](std::byte* memory) {
      const KvView view(layout, {memory});
      for (uint32_t layer = 0; layer < 2; ++layer) {
        for (uint32_t head = 0; head < 4; ++head) {
          for (uint32_t token = 0; token < kTokens; ++token) {
            const BlockId block = blocks[token / kBlockSize];
            const auto value = static_cast<float>(layer * 4000 + head * 1000 + token);
            visit(reinterpret_cast<float*>(view.K(layer, block, head, token % kBlockSize)), value);
            visit(reinterpret_cast<float*>(view.V(layer, block, head, token % kBlockSize)),
                  value + 0.5F);
          }
        }
      }
    });
  }
  KvConnector::Finished WaitFor(const std::function<bool(const KvConnector::Finished&)>& over) {
    const auto end = std::chrono::steady_clock::now() + std::chrono::seconds(20);
    KvConnector::Finished got;
    while (!over(got) && std::chrono::steady_clock::now() < end) {
      got = connector->GetFinished();
      std::this_thread::sleep_for(Millis(1));
    }
    EXPECT_TRUE(over(got));
    return got;
  }
  // Loads the ticket's prompt; its blocks are in `blocks`.
  Result<LoadResult> Load(const proto::Ticket& ticket) {
    blocks = pool->Allocate(kPromptBlocks).value();
    connector->StartLoadKv({.ticket = ticket,
                            .blocks = {blocks.Share(), 0},
                            .deadline = agent->env().clock.Now() + std::chrono::seconds(15)});
    return WaitFor([](const auto& got) { return !got.loads.empty(); }).loads.front().second;
  }

  const KvLayout layout;
  FakeDevice device;
  std::unique_ptr<HostXferBuffer> host;
  std::shared_ptr<BlockPool> pool = BlockPool::Create(kBlocks);
  SystemPrefixStore prefixes{4};
  BlockTable blocks;
  std::unique_ptr<EngineAgent> agent;
  std::unique_ptr<KvConnector> connector;
};

class HostXferTest : public testing::TestWithParam<const char*> {
 protected:
  // Computes a prompt on the owner's device, saves it to the host, and offers it.
  static proto::Ticket OfferPrompt(DeviceEngine& owner) {
    owner.blocks = owner.pool->Allocate(DeviceEngine::kPromptBlocks).value();
    owner.ForEachRow(owner.blocks.blocks(),
                     [](float* row, float value) { std::fill_n(row, 8, value); });
    EXPECT_TRUE(owner.host->SaveKvToHost(owner.blocks.blocks()).ok());
    OfferRequest offer;
    offer.blocks = {owner.blocks.Share(), 0};
    offer.tokens = DeviceEngine::kTokens;
    offer.hash.bytes[0] = 9;
    offer.finished = true;
    owner.connector->Offer(std::move(offer));
    auto got = owner.WaitFor([](const auto& finished) { return !finished.offers.empty(); });
    proto::Ticket ticket = got.offers.front().second.value();
    owner.agent->Writer(0, ticket.prompt.lease)
        ->Publish(
            {.tokens = DeviceEngine::kTokens, .chunk_end = DeviceEngine::kTokens, .layers = 0});
    return ticket;
  }

  const tests::TempDir folder_;
};

TEST_P(HostXferTest, KvCrossesFromDeviceToDevice) {
  DeviceEngine owner(KvFormat::kNhd, GetParam(), folder_.path());
  DeviceEngine reader(KvFormat::kHnd, GetParam(), folder_.path());
  const proto::Ticket ticket = OfferPrompt(owner);
  const auto loaded = reader.Load(ticket);
  ASSERT_TRUE(loaded.has_value()) << loaded.error().ToString();
  EXPECT_EQ(loaded->own.path, GetParam());
  EXPECT_EQ(owner.device.copied_blocks, DeviceEngine::kPromptBlocks);
  EXPECT_EQ(reader.device.copied_blocks, DeviceEngine::kPromptBlocks);
  reader.ForEachRow(reader.blocks.blocks(), [](const float* row, float value) {
    for (int i = 0; i < 8; ++i) ASSERT_EQ(row[i], value);
  });
}

TEST_P(HostXferTest, ACopyThatFailsIsALoadThatFailed) {
  DeviceEngine owner(KvFormat::kNhd, GetParam(), folder_.path());
  DeviceEngine reader(KvFormat::kNhd, GetParam(), folder_.path());
  reader.device.fail = true;
  const auto loaded = reader.Load(OfferPrompt(owner));
  ASSERT_FALSE(loaded.has_value());
  EXPECT_EQ(loaded.error().ToString(),
            "kInternal: copying to the device: rank 0: the device is gone");
}

INSTANTIATE_TEST_SUITE_P(Transports, HostXferTest, testing::Values("mapped", "ucx-packed"),
                         [](const auto& param) {
                           return std::string(param.param) == "mapped" ? "Mapped" : "UcxPacked";
                         });

TEST(HostXferBufferTest, RefusesWhatCannotBe) {
  const KvLayout layout = KvLayout::Dense(KvFormat::kNhd, DType::kFp32, 2, 4, 8, 16, 4);
  const KvShard shard = KvShard::Make(2, 4, 1, 0).value();
  EXPECT_EQ(
      HostXferBuffer::Initialize({{layout, shard, {layout.dense_bytes() - 1}}}).error().code(),
      Code::kInvalidArgument);
  const auto buffer = HostXferBuffer::Initialize({{layout, shard, {layout.dense_bytes()}}}).value();
  const BlockId block = 1;
  EXPECT_EQ(buffer->SaveKvToHost({&block, 1}).code(), Code::kInvalidArgument);
}

}  // namespace
}  // namespace kvrelay::agent
