#include "kvcache/plan_pull.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <functional>
#include <numeric>

namespace kvrelay {
namespace {

using ::testing::AllOf;
using ::testing::HasSubstr;

constexpr uint32_t kLayers = 2;
constexpr uint32_t kHeads = 4;
constexpr uint32_t kDim = 32;
constexpr uint32_t kBlock = 16;
constexpr uint32_t kBlocks = 100;
constexpr uint64_t kRow = kDim * 4;  // fp32

struct Rank {
  KvFormat format = KvFormat::kNhd;
  uint32_t tp = 1;
  uint32_t rank = 0;
  std::vector<BlockId> blocks;
  uint32_t first_token = 0;
};

// What one box of the plan should look like; every layer's K and V have the same.
struct Shape {
  CopyDim outer;
  CopyDim inner;
  uint64_t run_bytes;
  uint32_t segments;
  bool operator==(const Shape&) const = default;
};

void PrintTo(const Shape& s, std::ostream* out) {
  *out << "outer " << s.outer.count << " (" << s.outer.src_stride << " -> " << s.outer.dst_stride
       << "), inner " << s.inner.count << " (" << s.inner.src_stride << " -> " << s.inner.dst_stride
       << "), run " << s.run_bytes << ", segments " << s.segments;
}

struct Case {
  const char* name;
  Rank owner;
  Rank reader;
  uint32_t head_begin;
  uint32_t head_end;
  TokenRange tokens;
  std::vector<Shape> shapes;  // one per span of tokens
};

class PlanPullShape : public ::testing::TestWithParam<Case> {};

TEST_P(PlanPullShape, IsAsFewBoxesAndAsLongRunsAsTheLayoutsAllow) {
  const Case& c = GetParam();
  const auto layout = [](const Rank& r, const KvShard& shard) {
    return KvLayout::Dense(r.format, DType::kFp32, kLayers, shard.head_count, kDim, kBlock,
                           kBlocks);
  };
  const KvShard owner_shard = KvShard::Make(kLayers, kHeads, c.owner.tp, c.owner.rank).value();
  const KvShard reader_shard = KvShard::Make(kLayers, kHeads, c.reader.tp, c.reader.rank).value();
  const KvLayout owner = layout(c.owner, owner_shard);
  const KvLayout reader = layout(c.reader, reader_shard);
  const auto plan = PlanPull({owner, owner_shard, {c.owner.blocks, c.owner.first_token}},
                             {reader, reader_shard, {c.reader.blocks, c.reader.first_token}},
                             c.head_begin, c.head_end, c.tokens);
  ASSERT_TRUE(plan.has_value()) << plan.error().ToString();
  const std::vector<uint64_t> owner_bytes = {owner.dense_bytes()};
  const std::vector<uint64_t> reader_bytes = {reader.dense_bytes()};
  EXPECT_TRUE(plan->Validate(owner_bytes, reader_bytes).ok());
  EXPECT_EQ(plan->bytes(),
            uint64_t{c.tokens.size()} * (c.head_end - c.head_begin) * kRow * 2 * kLayers);
  std::vector<Shape> shapes;
  for (const CopyBox& b : plan->boxes) {
    EXPECT_EQ(b.num_places, 2 * kLayers);
    shapes.push_back({b.outer, b.inner, b.run_bytes, b.num_segments});
  }
  EXPECT_EQ(shapes, c.shapes);
}

constexpr uint64_t kNhdToken = kHeads * kRow;  // of a rank that holds all heads
constexpr uint64_t kHndHead = kBlock * kRow;
const CopyDim kOne;

const Case kCases[] = {
    {"NhdToNhdIsOneRunABlock",
     {KvFormat::kNhd, 1, 0, {7, 3}},
     {KvFormat::kNhd, 1, 0, {1, 2}},
     0,
     4,
     {0, 32},
     {{kOne, kOne, kBlock* kHeads* kRow, 2}}},
    {"HndToHndIsOneRunABlock",
     {KvFormat::kHnd, 1, 0, {7, 3}},
     {KvFormat::kHnd, 1, 0, {1, 2}},
     0,
     4,
     {0, 32},
     {{kOne, kOne, kBlock* kHeads* kRow, 2}}},
    {"NhdToHndWritesTokensInOrder",
     {KvFormat::kNhd, 1, 0, {7, 3}},
     {KvFormat::kHnd, 1, 0, {1, 2}},
     0,
     4,
     {0, 32},
     {{{kHeads, kRow, kHndHead}, {kBlock, kNhdToken, kRow}, kRow, 2}}},
    {"HndToNhdWritesHeadsInOrder",
     {KvFormat::kHnd, 1, 0, {7, 3}},
     {KvFormat::kNhd, 1, 0, {1, 2}},
     0,
     4,
     {0, 32},
     {{{kBlock, kRow, kNhdToken}, {kHeads, kHndHead, kRow}, kRow, 2}}},
    {"OneOwnerTwoReadersNhd",
     {KvFormat::kNhd, 1, 0, {7, 3}},
     {KvFormat::kNhd, 2, 1, {1, 2}},
     2,
     4,
     {0, 32},
     {{kOne, {kBlock, kNhdToken, kNhdToken / 2}, 2 * kRow, 2}}},
    {"OneOwnerTwoReadersHndIsOneRun",
     {KvFormat::kHnd, 1, 0, {7, 3}},
     {KvFormat::kHnd, 2, 1, {1, 2}},
     2,
     4,
     {0, 32},
     {{kOne, kOne, 2 * kBlock* kRow, 2}}},
    {"FourOwnersOneReaderNhd",
     {KvFormat::kNhd, 4, 3, {7, 3}},
     {KvFormat::kNhd, 1, 0, {1, 2}},
     3,
     4,
     {0, 32},
     {{kOne, {kBlock, kRow, kNhdToken}, kRow, 2}}},
    {"ReplicatedHeadsOnBothSides",
     {KvFormat::kNhd, 8, 7, {7, 3}},
     {KvFormat::kHnd, 8, 6, {1, 2}},
     3,
     4,
     {0, 32},
     {{kOne, kOne, kBlock* kRow, 2}}},
    {"InsideOneBlock",
     {KvFormat::kNhd, 1, 0, {7}},
     {KvFormat::kNhd, 1, 0, {1}},
     0,
     4,
     {3, 9},
     {{kOne, kOne, 6 * kHeads* kRow, 1}}},
    {"BeginsAndEndsInsideBlocks",
     {KvFormat::kNhd, 1, 0, {7, 3, 9, 4}},
     {KvFormat::kNhd, 1, 0, {1, 2, 5, 6}},
     0,
     4,
     {5, 50},
     {{kOne, kOne, 16 * kHeads* kRow, 2},
      {kOne, kOne, 11 * kHeads* kRow, 1},
      {kOne, kOne, 2 * kHeads* kRow, 1}}},
    {"TwoPartBlocksAndNoWholeOne",
     {KvFormat::kHnd, 1, 0, {7, 3}},
     {KvFormat::kHnd, 1, 0, {1, 2}},
     0,
     4,
     {15, 17},
     {{kOne, {kHeads, kHndHead, kHndHead}, kRow, 2}}},
    {"TokensBeginLaterInOneTable",
     {KvFormat::kNhd, 1, 0, {7, 3, 9}, 32},
     {KvFormat::kNhd, 1, 0, {90, 91, 92, 93, 94}, 0},
     0,
     4,
     {48, 80},
     {{kOne, kOne, kBlock* kHeads* kRow, 2}}},
    {"EmptyRangeIsAnEmptyPlan",
     {KvFormat::kNhd, 1, 0, {7, 3}},
     {KvFormat::kNhd, 1, 0, {1, 2}},
     0,
     4,
     {5, 5},
     {}},
};

INSTANTIATE_TEST_SUITE_P(All, PlanPullShape, ::testing::ValuesIn(kCases),
                         [](const auto& info) { return info.param.name; });

TEST(PlanPull, PairsFollowBothTablesFromTheFirstTokenOn) {
  const KvLayout layout = KvLayout::Dense(KvFormat::kNhd, DType::kFp32, 1, 1, kDim, kBlock, 100);
  const KvShard shard = KvShard::Make(1, 1, 1, 0).value();
  const std::vector<BlockId> owner = {7, 3, 9};
  const std::vector<BlockId> reader = {90, 91, 92, 93, 94};
  const auto plan =
      PlanPull({layout, shard, {owner, 32}}, {layout, shard, {reader, 0}}, 0, 1, {50, 80});
  ASSERT_TRUE(plan.has_value());
  EXPECT_EQ(plan->segments,
            (std::vector<CopySegment>{{9 * kBlock * kRow, 94 * kBlock * kRow},
                                      {(3 * kBlock + 2) * kRow, (93 * kBlock + 2) * kRow}}));
}

TEST(PlanPull, BoxesDoNotGrowWithBlocks) {
  const KvLayout layout =
      KvLayout::Dense(KvFormat::kNhd, DType::kFp32, kLayers, kHeads, kDim, kBlock, 10000);
  const KvLayout other =
      KvLayout::Dense(KvFormat::kHnd, DType::kFp32, kLayers, kHeads, kDim, kBlock, 10000);
  const KvShard shard = KvShard::Make(kLayers, kHeads, 1, 0).value();
  std::vector<BlockId> blocks(10000);
  std::iota(blocks.begin(), blocks.end(), 0);
  const auto plan = PlanPull({layout, shard, {blocks}}, {other, shard, {blocks}}, 0, kHeads,
                             {1, 10000 * kBlock - 1});
  ASSERT_TRUE(plan.has_value());
  EXPECT_EQ(plan->boxes.size(), 2U) << "whole blocks, and two of 15 tokens";
  EXPECT_EQ(plan->places.size(), 2 * kLayers);
  EXPECT_EQ(plan->segments.size(), 10000U);
  EXPECT_EQ(plan->slices(), (10000U * kBlock - 2) * kHeads * 2 * kLayers);
}

TEST(PlanPull, MlaIsOneHeadWithoutV) {
  const KvLayout layout = KvLayout::Dense(KvFormat::kMla, DType::kBf16, 3, 1, 576, kBlock, 10);
  const KvShard owner = KvShard::Make(3, 1, 4, 2).value();
  const KvShard reader = KvShard::Make(3, 1, 2, 1).value();
  const std::vector<BlockId> blocks = {4, 2};
  const auto plan = PlanPull({layout, owner, {blocks}}, {layout, reader, {blocks}}, 0, 1, {0, 32});
  ASSERT_TRUE(plan.has_value()) << plan.error().ToString();
  ASSERT_EQ(plan->boxes.size(), 1U);
  EXPECT_EQ(plan->places.size(), 3U);
  EXPECT_EQ(plan->boxes[0].run_bytes, kBlock * 576 * 2U);
}

TEST(PlanPull, PipelineStagesMeetInTheLayersOfBoth) {
  const KvLayout two = KvLayout::Dense(KvFormat::kNhd, DType::kFp32, 2, 1, kDim, kBlock, 10);
  const KvLayout three = KvLayout::Dense(KvFormat::kNhd, DType::kFp32, 3, 1, kDim, kBlock, 10);
  KvShard owner = KvShard::Make(6, 1, 1, 0).value();
  owner.layer_begin = 1, owner.layer_count = 2;  // 1, 2
  KvShard reader = KvShard::Make(6, 1, 1, 0).value();
  reader.layer_begin = 2, reader.layer_count = 3;  // 2, 3, 4
  const std::vector<BlockId> blocks = {4};
  auto plan = PlanPull({two, owner, {blocks}}, {three, reader, {blocks}}, 0, 1, {0, 16});
  ASSERT_TRUE(plan.has_value()) << plan.error().ToString();
  EXPECT_EQ(plan->places, (std::vector<CopyPlace>{{0, 0, two.k[1].offset, three.k[0].offset},
                                                  {0, 0, two.v[1].offset, three.v[0].offset}}));

  reader.layer_begin = 3;
  plan = PlanPull({two, owner, {blocks}}, {three, reader, {blocks}}, 0, 1, {0, 16});
  ASSERT_FALSE(plan.has_value());
  EXPECT_EQ(plan.error().code(), Code::kIncompatible);
  EXPECT_THAT(plan.error().message(), AllOf(HasSubstr("layers 1-2 of 6"), HasSubstr("layers 3-5")));
}

// A pull that works, to be spoilt.
struct Pull {
  KvLayout owner = KvLayout::Dense(KvFormat::kNhd, DType::kFp32, 2, 4, 32, 16, 10);
  KvLayout reader = owner;
  KvShard owner_shard = KvShard::Make(2, 4, 1, 0).value();
  KvShard reader_shard = owner_shard;
  std::vector<BlockId> owner_blocks = {1, 2};
  std::vector<BlockId> reader_blocks = {3, 4};
  uint32_t owner_first = 0;
  uint32_t reader_first = 0;
  uint32_t head_begin = 0;
  uint32_t head_end = 4;
  TokenRange tokens = {0, 32};

  Result<CopyPlan> Plan() const {
    return PlanPull({owner, owner_shard, {owner_blocks, owner_first}},
                    {reader, reader_shard, {reader_blocks, reader_first}}, head_begin, head_end,
                    tokens);
  }
};

void MakeOpaque(Pull& p) {
  for (KvLayout* layout : {&p.owner, &p.reader}) {
    layout->format = KvFormat::kOpaque;
    layout->page_bytes = 2048;
    layout->page_name = "amx";
  }
}

struct Refusal {
  const char* name;
  std::function<void(Pull&)> spoil;
  Code code;
  const char* message;
};

class PlanPullRefuses : public ::testing::TestWithParam<Refusal> {};

TEST_P(PlanPullRefuses, WithBothSidesValues) {
  Pull pull;
  ASSERT_TRUE(pull.Plan().has_value());
  GetParam().spoil(pull);
  const auto plan = pull.Plan();
  ASSERT_FALSE(plan.has_value());
  EXPECT_EQ(plan.error().code(), GetParam().code);
  EXPECT_THAT(plan.error().message(), HasSubstr(GetParam().message));
}

const Refusal kRefusals[] = {
    {"HeadDim", [](Pull& p) { p.reader.head_dim = 64; }, Code::kIncompatible,
     "head dim: owner has 32, reader 64"},
    {"Mla", [](Pull& p) { p.reader.v.clear(), p.reader.format = KvFormat::kMla; },
     Code::kIncompatible, "format: owner has nhd, reader mla"},
    {"ModelLayers", [](Pull& p) { p.reader_shard.total_layers = 3; }, Code::kIncompatible,
     "layers of the model: owner has 2, reader 3"},
    {"ModelHeads", [](Pull& p) { p.reader_shard.total_heads = 8; }, Code::kIncompatible,
     "KV heads of the model: owner has 4, reader 8"},
    {"OpaqueAndNot",
     [](Pull& p) {
       p.owner.format = KvFormat::kOpaque, p.owner.page_bytes = 2048, p.owner.page_name = "amx";
     },
     Code::kIncompatible, "owner has opaque \"amx\" of fp32, reader nhd"},
    {"OpaqueOfOthers", [](Pull& p) { MakeOpaque(p), p.reader.page_name = "vnni"; },
     Code::kIncompatible, "owner has opaque \"amx\" of fp32, reader opaque \"vnni\" of fp32"},
    {"OpaqueBlockSizes", [](Pull& p) { MakeOpaque(p), p.reader.block_size = 32; },
     Code::kIncompatible, "owner has 16 tokens in 2048 bytes, reader 32 tokens in 2048 bytes"},
    {"OpaqueCast", [](Pull& p) { MakeOpaque(p), p.reader.dtype = DType::kBf16; },
     Code::kIncompatible, "of bf16"},
    {"OpaqueScales",
     [](Pull& p) {
       MakeOpaque(p), p.reader.scales.k = {2, 2};
     },
     Code::kIncompatible, "scales"},
    {"OpaqueCutByTokens", [](Pull& p) { MakeOpaque(p), p.tokens.begin = 5; },
     Code::kInvalidArgument, "tokens 5 to 32 begin inside a page of 16"},
    {"Window", [](Pull& p) { p.owner.window = 512, p.reader.window = 1024; }, Code::kIncompatible,
     "owner has a window of 512, reader a window of 1024"},
    {"WindowOfTheOwnerAlone", [](Pull& p) { p.owner.window = 512; }, Code::kIncompatible,
     "owner has a window of 512, reader all tokens"},
    {"ScalesFarApart",
     [](Pull& p) {
       p.owner.scales = {false, {1e38F, 1e38F}, {1, 1}};
       p.reader.scales = {false, {1e-38F, 1e-38F}, {1, 1}};
     },
     Code::kIncompatible, "scales"},
    {"HeadGroups",
     [](Pull& p) {
       p.owner_shard.more_heads = {{2, 0, 2}};
     },
     Code::kIncompatible, "head groups: owner has 2, reader 1"},
    {"LayoutAndShardLayers", [](Pull& p) { p.owner.k.pop_back(), p.owner.v.pop_back(); },
     Code::kInvalidArgument, "owner's layout"},
    {"LayoutAndShardHeads", [](Pull& p) { p.reader.kv_heads = 2; }, Code::kInvalidArgument,
     "reader's layout"},
    {"FewerV", [](Pull& p) { p.owner.v.pop_back(); }, Code::kInvalidArgument, "owner's layout"},
    {"NoBlockSize", [](Pull& p) { p.owner.block_size = 0; }, Code::kInvalidArgument,
     "owner's layout"},
    {"AbsurdShard", [](Pull& p) { p.owner_shard.layer_begin = UINT32_MAX; }, Code::kInvalidArgument,
     "owner: KV shard"},
    {"HeadsOfNobody", [](Pull& p) { p.head_end = 5; }, Code::kInvalidArgument, "0 to 5"},
    {"NoHeads", [](Pull& p) { p.head_begin = 4; }, Code::kInvalidArgument, "4 to 4"},
    {"OwnerTableShort", [](Pull& p) { p.owner_blocks.pop_back(); }, Code::kInvalidArgument,
     "owner's table covers tokens 0 to 16, needed are 0 to 32"},
    {"ReaderTableShort", [](Pull& p) { p.tokens.end = 33, p.owner_blocks.push_back(0); },
     Code::kInvalidArgument, "reader's table covers tokens 0 to 32, needed are 0 to 33"},
    {"TableBeginsLate", [](Pull& p) { p.owner_first = 16; }, Code::kInvalidArgument,
     "owner's table covers tokens 16 to 48"},
    {"TableBeginsInsideABlock", [](Pull& p) { p.reader_first = 8; }, Code::kInvalidArgument,
     "no multiple of its block size 16"},
    {"RangeBackwards",
     [](Pull& p) {
       p.tokens = {20, 10};
     },
     Code::kInvalidArgument, "20 to 10"},
    {"OwnerBlockUnknown", [](Pull& p) { p.owner_blocks[1] = 10; }, Code::kInvalidArgument,
     "owner's table names block 10, it has 10"},
    {"ReaderBlockUnknown", [](Pull& p) { p.reader_blocks[0] = UINT32_MAX; }, Code::kInvalidArgument,
     "reader's table names block 4294967295"},
};

INSTANTIATE_TEST_SUITE_P(All, PlanPullRefuses, ::testing::ValuesIn(kRefusals),
                         [](const auto& info) { return info.param.name; });

TEST(PlanPull, BlockSizesThatDifferGiveOneBoxForEachLengthOfSegments) {
  const KvLayout owner = KvLayout::Dense(KvFormat::kNhd, DType::kBf16, 2, 4, 32, 24, 100);
  const KvLayout reader = KvLayout::Dense(KvFormat::kNhd, DType::kBf16, 2, 4, 32, 16, 100);
  const KvShard shard = KvShard::Make(2, 4, 1, 0).value();
  std::vector<BlockId> blocks(96);
  std::iota(blocks.begin(), blocks.end(), 0);
  const auto plan =
      PlanPull({owner, shard, {blocks}}, {reader, shard, {blocks}}, 0, 4, {0, 48 * 30});
  ASSERT_TRUE(plan.has_value());
  ASSERT_EQ(plan->boxes.size(), 2U);  // 16, 8 + 16, 8: of each 48 tokens two of 16, two of 8
  EXPECT_EQ(plan->boxes[0].run_bytes, 16 * 256U);
  EXPECT_EQ(plan->boxes[0].num_segments, 60U);
  EXPECT_EQ(plan->boxes[1].run_bytes, 8 * 256U);
  EXPECT_EQ(plan->boxes[1].num_segments, 60U);
}

TEST(PlanPull, WhatLiesTogetherOnBothSidesIsOneRun) {
  // All of a block's layers, K and V, one behind the other.
  KvLayout layout = KvLayout::Dense(KvFormat::kHnd, DType::kBf16, 3, 4, 32, 16, 10);
  const uint64_t tensor = layout.block_stride;
  layout.block_stride = 6 * tensor;
  for (uint64_t i = 0; i < 3; ++i)
    layout.k[i].offset = 2 * i * tensor, layout.v[i].offset = (2 * i + 1) * tensor;
  const KvShard shard = KvShard::Make(3, 4, 1, 0).value();
  const std::vector<BlockId> blocks = {7, 3};
  auto plan = PlanPull({layout, shard, {blocks}}, {layout, shard, {blocks}}, 0, 4, {0, 32});
  ASSERT_TRUE(plan.has_value());
  EXPECT_EQ(plan->places.size(), 1U);
  EXPECT_EQ(plan->slices(), 2U);
  EXPECT_EQ(plan->boxes[0].run_bytes, 6 * tensor);
  plan = PlanPull({layout, shard, {blocks}}, {layout, shard, {blocks}}, 1, 3, {0, 32});
  ASSERT_TRUE(plan.has_value());
  EXPECT_EQ(plan->places.size(), 6U);
  EXPECT_EQ(plan->boxes[0].run_bytes, tensor / 2);
}

TEST(PlanPull, ManySlicesAreASmallPlan) {
  const KvLayout layout = KvLayout::Dense(KvFormat::kNhd, DType::kBf16, 80, 8, 128, 16, 1000);
  const KvShard shard = KvShard::Make(80, 8, 1, 0).value();
  std::vector<BlockId> blocks(750);
  std::iota(blocks.rbegin(), blocks.rend(), 0);
  const auto plan =
      PlanPull({layout, shard, {blocks}}, {layout, shard, {blocks}}, 0, 8, {0, 750 * 16});
  ASSERT_TRUE(plan.has_value());
  EXPECT_EQ(plan->slices(), 120'000U);
  EXPECT_LT(plan->memory(), 100U << 10);
}

TEST(PlanPull, LayoutThatWasNeverValidatedGivesAPlanThatIsRefused) {
  Pull pull;
  const std::vector<uint64_t> bytes = {pull.owner.dense_bytes()};
  pull.owner.block_stride = UINT64_MAX - 7;
  pull.owner.head_stride = UINT64_MAX / 2;
  pull.owner.k[1].offset = UINT64_MAX;
  const auto plan = pull.Plan();
  ASSERT_TRUE(plan.has_value());
  EXPECT_EQ(plan->Validate(bytes, bytes).code(), Code::kInvalidArgument);
}

}  // namespace
}  // namespace kvrelay
