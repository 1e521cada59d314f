// Two engines' agents in one process, on real sockets and transports: offers, loads, and ends in
// the middle of them.
#include "agent/kv_connector.h"

#include <gtest/gtest.h>

#include <chrono>
#include <cstring>
#include <thread>

#include "base/random.h"
#include "kvcache/kv_view.h"
#include "tests/common/temp_dir.h"
#include "transport/ucx_one_sided.h"

namespace kvrelay::agent {
namespace {

// One engine: TP ranks over a cache of 2 layers x 4 heads.
struct TpEngine {
  static constexpr uint32_t kBlockSize = 16;
  static constexpr uint32_t kBlocks = 64;
  static constexpr uint32_t kTokens = 100;
  static constexpr uint32_t kPromptBlocks = (kTokens + kBlockSize - 1) / kBlockSize;

  TpEngine(uint32_t tp, const std::string& transport, KvFormat format, const std::string& run_dir) {
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
    options.model.bytes[0] = 7;
    options.block_size = kBlockSize;
    options.transport = transport;
    options.run_dir = run_dir;
    auto made = EngineAgent::Create(options, caches, pool, prefixes);
    EXPECT_TRUE(made.has_value()) << made.error().ToString();
    agent = std::move(*made);
    connector = std::make_unique<KvConnector>(*agent);
    agent->Run();
  }
  ~TpEngine() { agent->Shutdown(); }

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
  // Waits until `over` holds of all that finished so far.
  KvConnector::Finished WaitFor(const std::function<bool(const KvConnector::Finished&)>& over) {
    KvConnector::Finished all;
    const auto end = std::chrono::steady_clock::now() + std::chrono::seconds(20);
    while (!over(all) && std::chrono::steady_clock::now() < end) {
      KvConnector::Finished more = connector->GetFinished();
      for (auto& offer : more.offers) all.offers.push_back(std::move(offer));
      for (auto& load : more.loads) all.loads.push_back(std::move(load));
      all.drained.insert(all.drained.end(), more.drained.begin(), more.drained.end());
      std::this_thread::sleep_for(Millis(1));
    }
    EXPECT_TRUE(over(all));
    return all;
  }

  std::shared_ptr<BlockPool> pool = BlockPool::Create(kBlocks);
  SystemPrefixStore prefixes{4};
  std::vector<std::unique_ptr<Region>> regions;
  std::vector<KvView> views;
  std::vector<KvShard> shards;
  std::unique_ptr<EngineAgent> agent;
  std::unique_ptr<KvConnector> connector;
};

class KvConnectorTest : public testing::TestWithParam<std::string> {
 protected:
  void SetUp() override {
    const auto lanes = transport::FindOneSidedLanes("");
    if (GetParam() == "ucx-get" && !lanes.has_value()) GTEST_SKIP() << lanes.error().message();
  }

  // Offers a prompt whose KV is there, and gives its ticket.
  proto::Ticket OfferPrompt(TpEngine& owner) {
    BlockTable blocks = owner.pool->Allocate(TpEngine::kPromptBlocks).value();
    owner.ForEachRow(blocks.blocks(), [](float* row, float value) { std::fill_n(row, 8, value); });
    OfferRequest offer;
    offer.blocks = {std::move(blocks), 0};
    offer.tokens = TpEngine::kTokens;
    offer.hash.bytes[0] = 9;
    offer.finished = true;
    owner.connector->Offer(std::move(offer));
    auto done = owner.WaitFor([](const auto& finished) { return !finished.offers.empty(); });
    proto::Ticket ticket = done.offers.front().second.value();
    for (uint32_t rank = 0; rank < owner.agent->num_ranks(); ++rank) {
      owner.agent->Writer(rank, ticket.prompt.lease)
          ->Publish({.tokens = TpEngine::kTokens, .chunk_end = TpEngine::kTokens, .layers = 0});
    }
    return ticket;
  }
  LoadRequest LoadInto(TpEngine& reader, const proto::Ticket& ticket, const BlockTable& blocks) {
    return {.ticket = ticket,
            .blocks = {blocks.Share(), 0},
            .deadline = reader.agent->env().clock.Now() + std::chrono::seconds(15)};
  }

  const tests::TempDir folder_;
};

TEST_P(KvConnectorTest, LoadsAcrossTensorParallelSizesAndLayouts) {
  TpEngine owner(4, GetParam(), KvFormat::kNhd, folder_.path());
  TpEngine reader(2, GetParam(), KvFormat::kHnd, folder_.path());
  const proto::Ticket ticket = OfferPrompt(owner);
  const BlockTable blocks = reader.pool->Allocate(7).value();
  const auto id = reader.connector->StartLoadKv(LoadInto(reader, ticket, blocks));
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
  reader.connector->StartLoadKv(LoadInto(reader, ticket, blocks));
  const auto again = reader.WaitFor([](const auto& finished) { return !finished.drained.empty(); });
  EXPECT_EQ(again.loads.at(0).second.error().code(), Code::kLeaseEnded);
}

TEST_P(KvConnectorTest, EndsInTheMiddleOfLoadsLeakNothing) {
  for (int round = 0; round < 10; ++round) {
    TpEngine owner(2, GetParam(), KvFormat::kNhd, folder_.path());
    TpEngine reader(1, GetParam(), KvFormat::kNhd, folder_.path());
    const proto::Ticket ticket = OfferPrompt(owner);
    const BlockTable blocks = reader.pool->Allocate(7).value();
    const auto id = reader.connector->StartLoadKv(LoadInto(reader, ticket, blocks));
    std::this_thread::sleep_for(std::chrono::microseconds(700 * round));
    if (round % 3 == 0) reader.connector->Cancel(id);
    if (round % 2 == 0) owner.agent->Shutdown();
    // Both sides end here, with whatever is in flight.
  }
}

INSTANTIATE_TEST_SUITE_P(Transports, KvConnectorTest,
                         testing::Values("mapped", "ucx-get", "ucx-packed", "zmq-packed"),
                         [](const auto& param) {
                           std::string name = param.param;
                           std::erase(name, '-');
                           return name;
                         });

}  // namespace
}  // namespace kvrelay::agent
