#include <gtest/gtest.h>

#include <vector>

#include "attention/attention.h"

namespace kvrelay::attention {
namespace {

using Indices = std::vector<uint32_t>;

Sequence WithPrefix(const std::vector<BlockId>& prefix, uint32_t rows = 1) {
  Sequence sequence;
  sequence.rows = rows;
  sequence.context = 100;
  sequence.prefix = prefix;
  return sequence;
}

TEST(PlanRelay, GroupsByTheSamePrefixWhereverItsTableLies) {
  const std::vector<BlockId> a = {3, 1, 2};
  const std::vector<BlockId> copy_of_a(a.begin(), a.end());
  const std::vector<BlockId> longer = {3, 1, 2, 4};
  const std::vector<BlockId> other = {3, 2, 1};
  const std::vector<Sequence> sequences = {
      WithPrefix(a),  WithPrefix(other), WithPrefix(copy_of_a), WithPrefix(longer),
      WithPrefix({}), WithPrefix(other), WithPrefix(a)};
  const RelayMetadata metadata = PlanRelay({sequences, 1, 1.0F}, {});
  ASSERT_EQ(metadata.groups.size(), 2U);
  EXPECT_EQ(metadata.groups[0].sequences, (Indices{0, 2, 6}));
  EXPECT_EQ(metadata.groups[0].prefix.size(), 3U);
  EXPECT_EQ(metadata.groups[1].sequences, (Indices{1, 5}));
  EXPECT_EQ(metadata.paged, (Indices{3, 4}));
  EXPECT_TRUE(metadata.decision.relay);
  EXPECT_EQ(metadata.decision.why, "2 groups of 3 and 2");
}

TEST(PlanRelay, SaysWhyNot) {
  const std::vector<BlockId> a = {1};
  const std::vector<BlockId> b = {2};
  const std::vector<Sequence> none = {WithPrefix({}), WithPrefix({})};
  const std::vector<Sequence> lonely = {WithPrefix(a), WithPrefix(b)};
  const std::vector<Sequence> shared = {WithPrefix(a), WithPrefix(a)};

  EXPECT_EQ(PlanRelay({none, 1, 1.0F}, {}).decision.why, "no prefix");
  EXPECT_EQ(PlanRelay({lonely, 1, 1.0F}, {}).decision.why, "fewer than 2 sharers");
  EXPECT_EQ(PlanRelay({shared, 1, 1.0F}, {.min_sharers = 3}).decision.why, "fewer than 3 sharers");
  const RelayMetadata disabled = PlanRelay({shared, 1, 1.0F}, {.enabled = false});
  EXPECT_EQ(disabled.decision.why, "disabled");
  EXPECT_FALSE(disabled.decision.relay);
  EXPECT_EQ(disabled.paged, (Indices{0, 1}));
}

TEST(PlanRelay, SequencesWithoutNewRowsDoNotCount) {
  const std::vector<BlockId> a = {1};
  const std::vector<Sequence> sequences = {WithPrefix(a), WithPrefix(a, 0)};
  const RelayMetadata metadata = PlanRelay({sequences, 1, 1.0F}, {});
  EXPECT_EQ(metadata.decision.why, "fewer than 2 sharers");
  EXPECT_EQ(metadata.paged, (Indices{0}));
}

TEST(PlanRelay, OneGroup) {
  const std::vector<BlockId> a = {1};
  const std::vector<Sequence> sequences(16, WithPrefix(a));
  EXPECT_EQ(PlanRelay({sequences, 1, 1.0F}, {}).decision.why, "1 group of 16");
}

}  // namespace
}  // namespace kvrelay::attention
