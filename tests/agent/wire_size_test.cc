// What goes over the wire for a large request, against the promises.
#include <gtest/gtest.h>

#include <algorithm>
#include <numeric>
#include <random>

#include "kvcache/plan_pull.h"
#include "proto/codec.h"
#include "transport/transport.h"

namespace kvrelay::agent {
namespace {

constexpr uint32_t kLayers = 80;
constexpr uint32_t kTokenBlocks = 750;
constexpr uint32_t kBlockSize = 16;

// 750 blocks of a pool that has been in use for long: none beside another.
std::vector<BlockId> Scattered() {
  std::vector<BlockId> blocks(100'000);
  std::iota(blocks.begin(), blocks.end(), 0);
  std::shuffle(blocks.begin(), blocks.end(), std::mt19937_64(1));
  blocks.resize(kTokenBlocks);
  return blocks;
}

TEST(WireSize, TheClaimOf120000SlicesIsBelow8KiB) {
  const KvLayout layout =
      KvLayout::Dense(KvFormat::kNhd, DType::kBf16, kLayers, 8, 128, kBlockSize, 100'000);
  const KvShard shard = KvShard::Make(kLayers, 8, 1, 0).value();
  const std::vector<BlockId> blocks = Scattered();
  const PullSide side{layout, shard, {blocks}};
  ASSERT_EQ(PlanPull(side, side, 0, 8, {0, kTokenBlocks * kBlockSize})->slices(), 120'000U);

  for (const uint32_t ranks : {1U, 8U, 16U}) {
    proto::ClaimReply claim{.tables = {{.blocks = blocks}},
                            .first_token = 0,
                            .tokens = kTokenBlocks * kBlockSize,
                            .ranks = {},
                            .ttl_ms = 30'000};
    for (uint32_t rank = 0; rank < ranks; ++rank) {
      claim.ranks.push_back({.endpoint = "tcp://prefill-17.example.org:4321" + std::to_string(rank),
                             .rank = rank,
                             .incarnation = UINT64_MAX,
                             .slot = 4095,
                             .epoch = UINT64_MAX >> 16,
                             .shard = KvShard::Make(kLayers, 8, ranks, rank).value(),
                             .scales = {}});
    }
    const size_t bytes = proto::Encode(claim).size();
    EXPECT_LT(bytes, 8U << 10) << ranks << " ranks";
    RecordProperty("claim_bytes_" + std::to_string(ranks) + "_ranks", std::to_string(bytes));
  }
}

TEST(WireSize, ItsPackedReadIsBelow1KiB) {
  proto::PackedRead read;
  read.shape.layers.resize(kLayers);
  std::iota(read.shape.layers.begin(), read.shape.layers.end(), 0);
  read.shape.head_end = 8;
  read.shape.tokens = {0, kTokenBlocks * kBlockSize};
  read.shape.segment_tokens = 128;
  read.shape.head_dim = 128;
  read.reader_incarnation = read.owner_incarnation = read.stream = UINT64_MAX;
  read.epoch = UINT64_MAX >> 16;
  read.chunk_bytes = 1 << 20;
  read.transport = "ucx-packed";
  transport::Options options;
  options.executor = [](const std::function<void()>&) {};
  const auto transport = transport::CreateUcxPacked(std::move(options));
  ASSERT_TRUE(transport.has_value()) << transport.error().ToString();
  read.address = (*transport)->LocalAddress();
  read.timeout_ms = 30'000;
  const size_t bytes = proto::Encode(read).size();
  EXPECT_LT(bytes, 1U << 10);
  RecordProperty("packed_read_bytes", std::to_string(bytes));
}

}  // namespace
}  // namespace kvrelay::agent
