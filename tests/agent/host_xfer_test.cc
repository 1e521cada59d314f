// Caches that the network cannot reach: a fake device whose memory can only be touched inside the
// user's copy functions, any other access is a crash.
#include <gtest/gtest.h>
#include <sys/mman.h>

#include <algorithm>
#include <cstring>
#include <functional>

#include "agent/host_xfer_buffer.h"
#include "base/mapping.h"
#include "kvcache/kv_view.h"
#include "tests/agent/engine_fixture.h"

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
class DeviceEngine : public TestEngine {
 public:
  static constexpr uint32_t kBlockSize = 16;
  static constexpr uint32_t kBlocks = 32;
  static constexpr uint32_t kTokens = 100;
  static constexpr uint32_t kPromptBlocks = (kTokens + kBlockSize - 1) / kBlockSize;

  DeviceEngine(KvFormat format, const std::string& transport, const std::string& run_dir)
      : TestEngine(kBlocks),
        layout(KvLayout::Dense(format, DType::kFp32, 2, 4, 8, kBlockSize, kBlocks)),
        device(layout.dense_bytes()) {
    host = HostXferBuffer::Initialize(
               {{layout, KvShard::Make(2, 4, 1, 0).value(), {layout.dense_bytes()}}})
               .value();
    host->SetOps({.d2h = [this](const auto& rank,
                                auto blocks) { return device.CopyBlocks(rank, blocks, true); },
                  .h2d = [this](const auto& rank,
                                auto blocks) { return device.CopyBlocks(rank, blocks, false); }});
    EngineAgentOptions options;
    options.block_size = kBlockSize;
    options.transport = transport;
    options.run_dir = run_dir;
    Start(std::move(options), host->caches(), host.get());
  }
  ~DeviceEngine() { Stop(); }

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
  // Loads the ticket's prompt; its blocks are in `blocks`.
  Result<LoadResult> Load(const proto::Ticket& ticket) {
    blocks = pool->Allocate(kPromptBlocks).value();
    StartLoad(ticket, {blocks.Share(), 0});
    return WaitFor([](const auto& got) { return !got.loads.empty(); }).loads.front().second;
  }

  const KvLayout layout;
  FakeDevice device;
  std::unique_ptr<HostXferBuffer> host;
  BlockTable blocks;
};

class HostXferTest : public TransportsTest {
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
    const proto::Ticket ticket = owner.Offer(std::move(offer));
    owner.agent->Writer(0, ticket.prompt.lease)
        ->Publish(
            {.tokens = DeviceEngine::kTokens, .chunk_end = DeviceEngine::kTokens, .layers = 0});
    return ticket;
  }
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
                         InstanceName);

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
