// Two engines' agents in one process, on real sockets and transports: offers, loads, and ends in
// the middle of them.
#include "agent/kv_connector.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <chrono>
#include <thread>

#include "kvcache/kv_view.h"
#include "tests/agent/engine_fixture.h"

namespace kvrelay::agent {
namespace {

// TP ranks over a cache of 2 layers x 4 heads.
class TpEngine : public TestEngine {
 public:
  static constexpr uint32_t kBlockSize = 16;
  static constexpr uint32_t kBlocks = 64;
  static constexpr uint32_t kTokens = 100;
  static constexpr uint32_t kPromptBlocks = (kTokens + kBlockSize - 1) / kBlockSize;

  TpEngine(uint32_t tp, const std::string& transport, KvFormat format, const std::string& run_dir)
      : TestEngine(kBlocks) {
    std::vector<RankCache> caches;
    for (uint32_t rank = 0; rank < tp; ++rank) {
      const KvShard shard = KvShard::Make(2, 4, tp, rank).value();
      const KvLayout layout =
          KvLayout::Dense(format, DType::kFp32, 2, shard.head_count, 8, kBlockSize, kBlocks);
      regions.push_back(
          std::make_unique<Region>(Region::AllocateHost(layout.dense_bytes(), "test").value()));
      views.emplace_back(layout, std::vector<std::byte*>{regions.back()->data()});
      shards.push_back(shard);
      caches.push_back({layout, shard, {regions.back().get()}});
    }
    EngineAgentOptions options;
    options.block_size = kBlockSize;
    options.transport = transport;
    options.run_dir = run_dir;
    Start(std::move(options), caches);
  }
  ~TpEngine() { Stop(); }

  float* At(uint32_t rank, uint32_t layer, bool v, std::span<const BlockId> blocks, uint32_t head,
            uint32_t token) {
    const BlockId block = blocks[token / kBlockSize];
    const uint32_t local = head - shards[rank].head_begin;
    return reinterpret_cast<float*>(v ? views[rank].V(layer, block, local, token % kBlockSize)
                                      : views[rank].K(layer, block, local, token % kBlockSize));
  }
  // Calls visit(row, value that belongs there) for every row of the first kTokens tokens.
  template <typename Visit>
  void ForEachRow(std::span<const BlockId> blocks, Visit visit) {
    for (uint32_t rank = 0; rank < views.size(); ++rank) {
      for (uint32_t layer = 0; layer < 2; ++layer) {
        for (uint32_t head = shards[rank].head_begin; head < shards[rank].head_end(); ++head) {
          for (uint32_t token = 0; token < kTokens; ++token) {
            for (const bool v : {false, true}) {
              visit(At(rank, layer, v, blocks, head, token),
                    static_cast<float>(layer * 4000 + head * 1000 + token) + (v ? 0.5F : 0));
            }
          }
        }
      }
    }
  }
  std::vector<std::unique_ptr<Region>> regions;
  std::vector<KvView> views;
  std::vector<KvShard> shards;
};

class KvConnectorTest : public TransportsTest {
 protected:
  // Offers a prompt whose KV is there, and gives its ticket.
  static proto::Ticket OfferPrompt(TpEngine& owner) {
    BlockTable blocks = owner.pool->Allocate(TpEngine::kPromptBlocks).value();
    owner.ForEachRow(blocks.blocks(), [](float* row, float value) { std::fill_n(row, 8, value); });
    OfferRequest offer;
    offer.blocks = {std::move(blocks), 0};
    offer.tokens = TpEngine::kTokens;
    const proto::Ticket ticket = owner.Offer(std::move(offer));
    for (uint32_t rank = 0; rank < owner.agent->num_ranks(); ++rank) {
      owner.agent->Writer(rank, ticket.prompt.lease)
          ->Publish({.tokens = TpEngine::kTokens, .chunk_end = TpEngine::kTokens, .layers = 0});
    }
    return ticket;
  }
};

TEST_P(KvConnectorTest, LoadsAcrossTensorParallelSizesAndLayouts) {
  TpEngine owner(4, GetParam(), KvFormat::kNhd, folder_.path());
  TpEngine reader(2, GetParam(), KvFormat::kHnd, folder_.path());
  const proto::Ticket ticket = OfferPrompt(owner);
  const BlockTable blocks = reader.pool->Allocate(7).value();
  const auto id = reader.StartLoad(ticket, {blocks.Share(), 0});
  const auto done = reader.WaitFor([](const auto& finished) { return !finished.drained.empty(); });
  ASSERT_EQ(done.loads.size(), 1U);
  EXPECT_EQ(done.loads[0].first, id);
  ASSERT_TRUE(done.loads[0].second.has_value()) << done.loads[0].second.error().ToString();
  EXPECT_EQ(done.loads[0].second->own.path, GetParam());
  EXPECT_EQ(done.loads[0].second->own.bytes,
            uint64_t{TpEngine::kTokens} * 2 * 2 * 4 * 8 * sizeof(float));
  reader.ForEachRow(blocks.blocks(), [](const float* row, float value) {
    for (int i = 0; i < 8; ++i) ASSERT_EQ(row[i], value);
  });
  // Its one reader released the lease: the owner's blocks come back, and the ticket is worthless.
  const auto end = std::chrono::steady_clock::now() + std::chrono::seconds(10);
  while (owner.pool->used_blocks() > 0 && std::chrono::steady_clock::now() < end) {
    std::this_thread::sleep_for(Millis(1));
  }
  EXPECT_EQ(owner.pool->used_blocks(), 0U);
  reader.StartLoad(ticket, {blocks.Share(), 0});
  const auto again = reader.WaitFor([](const auto& finished) { return !finished.drained.empty(); });
  EXPECT_EQ(again.loads.at(0).second.error().code(), Code::kLeaseEnded);
}

TEST_P(KvConnectorTest, EndsInTheMiddleOfLoadsLeakNothing) {
  for (int round = 0; round < 10; ++round) {
    TpEngine owner(2, GetParam(), KvFormat::kNhd, folder_.path());
    TpEngine reader(1, GetParam(), KvFormat::kNhd, folder_.path());
    const proto::Ticket ticket = OfferPrompt(owner);
    const BlockTable blocks = reader.pool->Allocate(7).value();
    const auto id = reader.StartLoad(ticket, {blocks.Share(), 0});
    std::this_thread::sleep_for(std::chrono::microseconds(700 * round));
    if (round % 3 == 0) reader.connector->Cancel(id);
    if (round % 2 == 0) owner.agent->Shutdown();
    // Both sides end here, with whatever is in flight.
  }
}

INSTANTIATE_TEST_SUITE_P(Transports, KvConnectorTest,
                         testing::Values("mapped", "ucx-get", "ucx-packed", "zmq-packed"),
                         InstanceName);

}  // namespace
}  // namespace kvrelay::agent
