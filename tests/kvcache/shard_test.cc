#include "kvcache/shard.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <map>

namespace kvrelay {
namespace {

using ::testing::AllOf;
using ::testing::ElementsAre;
using ::testing::HasSubstr;

std::vector<KvShard> AllRanks(uint32_t layers, uint32_t heads, uint32_t tp) {
  std::vector<KvShard> ranks;
  for (uint32_t rank = 0; rank < tp; ++rank) {
    ranks.push_back(KvShard::Make(layers, heads, tp, rank).value());
  }
  return ranks;
}

bool Splits(uint32_t heads, uint32_t tp) { return heads % tp == 0 || tp % heads == 0; }

TEST(KvShard, HeadsDivideOverRanks) {
  const KvShard shard = KvShard::Make(6, 4, 2, 1).value();
  EXPECT_EQ(shard.head_begin, 2U);
  EXPECT_EQ(shard.head_end(), 4U);
  EXPECT_EQ(shard.layer_end(), 6U);
  EXPECT_EQ(shard.ToString(), "rank 1 of 2: layers 0-5 of 6, heads 2-3 of 4");
}

TEST(KvShard, MoreRanksThanHeadsHoldReplicas) {
  std::vector<uint32_t> heads;
  for (const KvShard& shard : AllRanks(1, 2, 6)) {
    EXPECT_EQ(shard.head_count, 1U);
    heads.push_back(shard.head_begin);
  }
  EXPECT_THAT(heads, ElementsAre(0, 0, 0, 1, 1, 1));
  EXPECT_EQ(KvShard::Make(1, 1, 4, 3)->ToString(), "rank 3 of 4: layer 0 of 1, head 0 of 1");
}

TEST(KvShard, SizesThatDoNotDivideSplitAsEvenlyAsTheyCan) {
  for (uint32_t heads = 1; heads <= 20; ++heads) {
    for (uint32_t tp = 1; tp <= 20; ++tp) {
      uint32_t next = 0;
      for (const KvShard& shard : AllRanks(1, heads, tp)) {
        EXPECT_TRUE(shard.head_begin == next || (tp > heads && shard.head_begin + 1 == next));
        next = shard.head_end();
        EXPECT_GE(shard.head_count, std::max(1U, heads / tp));
        EXPECT_LE(shard.head_count, (heads + tp - 1) / tp);
      }
      EXPECT_EQ(next, heads) << heads << " heads, TP " << tp;
    }
  }
}

TEST(KvShard, OfNothingIsRefused) {
  EXPECT_FALSE(KvShard::Make(6, 4, 0, 0).has_value());
  EXPECT_FALSE(KvShard::Make(6, 0, 1, 0).has_value());
  EXPECT_FALSE(KvShard::Make(0, 4, 1, 0).has_value());
  EXPECT_FALSE(KvShard::Make(6, 4, 2, 2).has_value());
}

TEST(KvShard, HostileValuesAreRefused) {
  const KvShard good = KvShard::Make(6, 4, 2, 1).value();
  const auto refused = [&good](auto spoil) {
    KvShard shard = good;
    spoil(shard);
    return shard.Validate().code() == Code::kInvalidArgument;
  };
  EXPECT_TRUE(good.Validate().ok());
  EXPECT_TRUE(refused([](KvShard& s) { s.tp_size = 0; }));
  EXPECT_TRUE(refused([](KvShard& s) { s.tp_rank = 2; }));
  EXPECT_TRUE(refused([](KvShard& s) { s.tp_size = UINT32_MAX; }));
  EXPECT_TRUE(refused([](KvShard& s) { s.layer_count = 0; }));
  EXPECT_TRUE(refused([](KvShard& s) { s.layer_begin = 1; }));
  EXPECT_TRUE(refused([](KvShard& s) { s.layer_begin = UINT32_MAX; }));
  EXPECT_TRUE(refused([](KvShard& s) { s.total_layers = UINT32_MAX; }));
  EXPECT_TRUE(refused([](KvShard& s) { s.head_count = 0; }));
  EXPECT_TRUE(refused([](KvShard& s) { s.head_count = UINT32_MAX; }));
  EXPECT_TRUE(refused([](KvShard& s) { s.head_begin = UINT32_MAX, s.head_count = 2; }));
  EXPECT_TRUE(refused([](KvShard& s) { s.total_heads = UINT32_MAX; }));
}

TEST(AssignSources, EveryHeadComesExactlyOnceFromARankThatHoldsIt) {
  int cases = 0;
  for (uint32_t heads = 1; heads <= 16; ++heads) {
    for (uint32_t owner_tp = 1; owner_tp <= 16; ++owner_tp) {
      for (uint32_t reader_tp = 1; reader_tp <= 16; ++reader_tp) {
        ++cases;
        SCOPED_TRACE(testing::Message() << "heads " << heads << ", owner TP " << owner_tp
                                        << ", reader TP " << reader_tp);
        const auto owners = AllRanks(4, heads, owner_tp);
        // By owner rank: how many reader ranks read it.
        std::vector<uint32_t> readers_of(owner_tp, 0);
        for (const KvShard& reader : AllRanks(4, heads, reader_tp)) {
          const auto sources = AssignSources(reader, owners);
          ASSERT_TRUE(sources.has_value()) << sources.error().ToString();
          std::vector<int> times(heads, 0);
          for (const PullSource& source : *sources) {
            ASSERT_LT(source.owner, owners.size());
            ASSERT_LT(source.head_begin, source.head_end);
            ASSERT_GE(source.head_begin, owners[source.owner].head_begin);
            ASSERT_LE(source.head_end, owners[source.owner].head_end());
            for (uint32_t h = source.head_begin; h < source.head_end; ++h) ++times[h];
            ++readers_of[source.owner];
          }
          for (uint32_t h = 0; h < heads; ++h) {
            const bool own = h >= reader.head_begin && h < reader.head_end();
            ASSERT_EQ(times[h], own ? 1 : 0) << "head " << h << " of " << reader.ToString();
          }
          // One source a rank: the heads of one owner are merged.
          ASSERT_LE(sources->size(), std::min(reader.head_count, owner_tp));
        }
        // Replicas of one head are read equally often, give or take one.
        if (owner_tp > heads && Splits(heads, owner_tp) && Splits(heads, reader_tp)) {
          const uint32_t replicas = owner_tp / heads;
          for (uint32_t h = 0; h < heads; ++h) {
            const auto first = readers_of.begin() + h * replicas;
            const auto [least, most] = std::minmax_element(first, first + replicas);
            ASSERT_LE(*most - *least, 1U) << "head " << h;
          }
        }
      }
    }
  }
  EXPECT_EQ(cases, 16 * 16 * 16);
}

TEST(AssignSources, PipelineStagesAreReadOneAfterTheOther) {
  const KvShard reader = KvShard::Make(6, 4, 1, 0).value();
  std::vector<KvShard> owners = AllRanks(6, 4, 2);
  for (KvShard& owner : owners) owner.layer_count = 2;
  const std::vector<KvShard> first = owners;
  for (KvShard owner : first) {
    owner.layer_begin = 2, owner.layer_count = 4;
    owners.push_back(owner);
  }
  const std::vector<PullSource> expected = {{0, 0, 2}, {1, 2, 4}, {2, 0, 2}, {3, 2, 4}};
  EXPECT_EQ(AssignSources(reader, owners).value(), expected);
}

TEST(AssignSources, WhatNobodyHoldsIsIncompatibleAndNamed) {
  const KvShard reader = KvShard::Make(6, 4, 1, 0).value();
  std::vector<KvShard> owners = AllRanks(6, 4, 4);
  owners.erase(owners.begin() + 2);
  auto sources = AssignSources(reader, owners);
  ASSERT_FALSE(sources.has_value());
  EXPECT_EQ(sources.error().code(), Code::kIncompatible);
  EXPECT_THAT(sources.error().message(),
              AllOf(HasSubstr("KV head 2"), HasSubstr("reader rank 0 of 1"),
                    HasSubstr("rank 3 of 4: layers 0-5 of 6, head 3 of 4")));

  owners = AllRanks(6, 4, 1);
  owners[0].layer_count = 5;
  sources = AssignSources(reader, owners);
  ASSERT_FALSE(sources.has_value());
  EXPECT_EQ(sources.error().code(), Code::kIncompatible);
  EXPECT_THAT(sources.error().message(), HasSubstr("layers 0-4 of 6"));

  owners[0].layer_begin = 1;  // layer 0 is missing now
  EXPECT_EQ(AssignSources(reader, owners).error().code(), Code::kIncompatible);
  owners.push_back(KvShard::Make(6, 4, 1, 0).value());  // layers 1 to 5 twice
  EXPECT_EQ(AssignSources(reader, owners).error().code(), Code::kIncompatible);
  EXPECT_EQ(AssignSources(reader, {}).error().code(), Code::kIncompatible);
}

TEST(AssignSources, OtherModelIsIncompatible) {
  const KvShard reader = KvShard::Make(6, 4, 1, 0).value();
  EXPECT_EQ(AssignSources(reader, AllRanks(6, 8, 1)).error().code(), Code::kIncompatible);
  EXPECT_EQ(AssignSources(reader, AllRanks(7, 4, 1)).error().code(), Code::kIncompatible);
}

}  // namespace
}  // namespace kvrelay
