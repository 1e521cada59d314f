// Scales that come with a request: what a reader takes of each source, and what a plan makes of
// them.
#include "kvcache/request_scales.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <string>
#include <vector>

namespace kvrelay {
namespace {

using testing::ElementsAre;
using testing::HasSubstr;

struct ScaledRank {
  static constexpr uint32_t kLayers = 2;
  static constexpr uint32_t kHeads = 4;
  static constexpr BlockId kBlocks[] = {0};

  ScaledRank(uint32_t tp, uint32_t tp_rank, DType dtype, bool per_head)
      : shard(KvShard::Make(kLayers, kHeads, tp, tp_rank).value()),
        layout(KvLayout::Dense(KvFormat::kNhd, dtype, kLayers, shard.head_count, 8, 16, 4)) {
    layout.scales.with_request = true;
    layout.scales.per_head = per_head;
  }
  PullSide With(const KvScales* scales) const {
    return {layout, shard, {.blocks = kBlocks}, {}, scales};
  }
  PullSource All(uint32_t owner = 0) const { return {owner, shard.head_begin, shard.head_end()}; }

  KvShard shard;
  KvLayout layout;
};

TEST(RequestScales, AreAsManyAsTheCacheNeedsAndNoneWhereItHasItsOwn) {
  ScaledRank rank(2, 0, DType::kInt8, true);
  const auto why = [&](const KvScales& scales) {
    return CheckRequestScales(rank.layout, scales).message();
  };
  KvScales good{.per_head = true, .k = {1, 2, 3, 4}, .v = {5, 6, 7, 8}};
  EXPECT_EQ(why(good), "");
  KvScales bad = good;
  bad.k.pop_back();
  EXPECT_THAT(why(bad), HasSubstr("3 scales of K, needed are 4"));
  bad = good;
  bad.v[2] = -1;
  EXPECT_THAT(why(bad), HasSubstr("a scale of V is -1"));
  bad = good;
  bad.per_head = false;
  EXPECT_THAT(why(bad), HasSubstr("not per head"));
  EXPECT_THAT(why({.per_head = true, .k = {}, .v = {}}), HasSubstr("0 scales of K"));
  rank.layout.scales = {};
  EXPECT_EQ(why({}), "");
  EXPECT_THAT(why(good), HasSubstr("whose own hold for all"));
}

TEST(RequestScales, AreTakenHeadByHeadFromEachSource) {
  const ScaledRank left(2, 0, DType::kInt8, true);
  const ScaledRank right(2, 1, DType::kInt8, true);
  const KvScales of_left{.per_head = true, .k = {1, 2, 3, 4}, .v = {11, 12, 13, 14}};
  const KvScales of_right{.per_head = true, .k = {5, 6, 7, 8}, .v = {15, 16, 17, 18}};
  const ScaledRank whole(1, 0, DType::kInt8, true);
  TakenScales taken(whole.layout, whole.shard);
  ASSERT_TRUE(taken.Take(left.With(&of_left), left.All(0)).ok());
  ASSERT_TRUE(taken.Take(right.With(&of_right), right.All(1)).ok());
  EXPECT_THAT(taken.scales().k, ElementsAre(1, 2, 5, 6, 3, 4, 7, 8));
  EXPECT_THAT(taken.scales().v, ElementsAre(11, 12, 15, 16, 13, 14, 17, 18));
  EXPECT_TRUE(CheckRequestScales(whole.layout, taken.scales()).ok());

  const KvScales of_whole = taken.scales();
  TakenScales back(right.layout, right.shard);
  ASSERT_TRUE(back.Take(whole.With(&of_whole), right.All()).ok());
  EXPECT_EQ(back.scales(), of_right);
}

TEST(RequestScales, OfATensorMustBeOneWhereTheReaderKeepsOne) {
  const ScaledRank left(2, 0, DType::kInt8, false);
  const ScaledRank right(2, 1, DType::kInt8, false);
  const KvScales of_left{.k = {1, 2}, .v = {3, 4}};
  KvScales of_right = of_left;
  const ScaledRank whole(1, 0, DType::kInt8, false);
  TakenScales same(whole.layout, whole.shard);
  ASSERT_TRUE(same.Take(left.With(&of_left), left.All(0)).ok());
  ASSERT_TRUE(same.Take(right.With(&of_right), right.All(1)).ok());
  EXPECT_EQ(same.scales(), of_left);

  of_right.v[1] = 9;
  TakenScales other(whole.layout, whole.shard);
  ASSERT_TRUE(other.Take(left.With(&of_left), left.All(0)).ok());
  const Status refused = other.Take(right.With(&of_right), right.All(1));
  EXPECT_EQ(refused.code(), Code::kIncompatible);
  EXPECT_THAT(refused.message(), HasSubstr("layer 1"));

  // Per head there is room for both.
  const ScaledRank by_head(1, 0, DType::kInt8, true);
  TakenScales spread(by_head.layout, by_head.shard);
  ASSERT_TRUE(spread.Take(left.With(&of_left), left.All(0)).ok());
  ASSERT_TRUE(spread.Take(right.With(&of_right), right.All(1)).ok());
  EXPECT_THAT(spread.scales().v, ElementsAre(3, 3, 3, 3, 4, 4, 9, 9));
}

TEST(RequestScales, GoWithNumbersThatStayAsTheyAre) {
  const ScaledRank rank(1, 0, DType::kInt8, true);
  const KvScales scales{
      .per_head = true, .k = {1, 2, 3, 4, 5, 6, 7, 8}, .v = {1, 1, 1, 1, 2, 2, 2, 2}};
  const auto plan =
      PlanPull(rank.With(&scales), rank.With(&scales), 0, ScaledRank::kHeads, {0, 16});
  ASSERT_TRUE(plan.has_value()) << plan.error().ToString();
  EXPECT_TRUE(plan->factors.empty());

  ScaledRank meaning(1, 0, DType::kFp16, true);
  meaning.layout.scales = {};
  const auto cast =
      PlanPull(rank.With(&scales), meaning.With(nullptr), 0, ScaledRank::kHeads, {0, 16});
  ASSERT_TRUE(cast.has_value()) << cast.error().ToString();
  ForEachRun(*cast, [&](const CopyBox& box, const PlanRun& run) {
    ASSERT_TRUE(box.casts);
    const uint64_t row =
        run.dst % (ScaledRank::kHeads * 16) / 16;  // the head, in a block of [token][head][dim]
    const uint64_t tensor_bytes = 4ULL * 16 * ScaledRank::kHeads * 16;
    const uint64_t tensor = run.dst / tensor_bytes;  // K and V of layer 0, then of layer 1
    const std::vector<float>& of = tensor % 2 == 0 ? scales.k : scales.v;
    EXPECT_EQ(run.factor, of[tensor / 2 * ScaledRank::kHeads + row]);
  });
}

TEST(RequestScales, AreMissedAndMisfitsAreRefused) {
  const ScaledRank rank(1, 0, DType::kInt8, true);
  const KvScales scales{
      .per_head = true, .k = std::vector<float>(8, 2), .v = std::vector<float>(8, 2)};
  const auto why = [](const PullSide& owner, const PullSide& reader) {
    const auto plan = PlanPull(owner, reader, 0, ScaledRank::kHeads, {0, 16});
    return plan.has_value() ? "it is planned" : plan.error().ToString();
  };
  EXPECT_THAT(why(rank.With(nullptr), rank.With(&scales)), HasSubstr("owner's scales come with"));
  EXPECT_THAT(why(rank.With(&scales), rank.With(nullptr)), HasSubstr("reader's scales come with"));

  ScaledRank plain(1, 0, DType::kFp16, true);
  plain.layout.scales = {};
  EXPECT_THAT(why(plain.With(nullptr), rank.With(&scales)),
              testing::AllOf(HasSubstr("converts nothing"), HasSubstr("fp16"), HasSubstr("int8")));
  const ScaledRank by_tensor(1, 0, DType::kInt8, false);
  EXPECT_THAT(CheckServable(rank.layout, rank.shard, by_tensor.layout, by_tensor.shard).message(),
              testing::AllOf(HasSubstr("per head"), HasSubstr("per tensor")));
}

}  // namespace
}  // namespace kvrelay
