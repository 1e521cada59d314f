#include <gtest/gtest.h>

#include <string>
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
  const std::vector<BlockId> lonely = {5, 1, 2, 4};
  const std::vector<BlockId> other = {4, 2, 1};
  const std::vector<Sequence> sequences = {
      WithPrefix(a),  WithPrefix(other), WithPrefix(copy_of_a), WithPrefix(lonely),
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

// What is read for whom, as text: "blocks 3 1 at 0 for 0 2 6".
std::vector<std::string> Forest(const RelayMetadata& metadata) {
  std::vector<std::string> nodes;
  for (const RelayMetadata::Group& group : metadata.groups) {
    std::string text = std::string(group.level, '>') + "blocks";
    for (const BlockId block : group.prefix) text += " " + std::to_string(block);
    text += " at " + std::to_string(group.first_block) + " for";
    for (const uint32_t i : group.sequences) text += " " + std::to_string(i);
    nodes.push_back(text);
  }
  return nodes;
}

TEST(PlanRelay, SharersOfAPrefixShareLongerOnesInSmallerGroups) {
  const std::vector<BlockId> system = {3, 1};
  const std::vector<BlockId> tool = {3, 1, 7, 8};
  const std::vector<BlockId> document = {3, 1, 7, 8, 9};
  const std::vector<BlockId> other_tool = {3, 1, 5};
  const std::vector<BlockId> lonely_tool = {3, 1, 6, 2};
  const std::vector<Sequence> sequences = {
      WithPrefix(tool),     WithPrefix(other_tool),  WithPrefix(document), WithPrefix(system),
      WithPrefix(document), WithPrefix(lonely_tool), WithPrefix({}),       WithPrefix(other_tool)};
  const RelayMetadata metadata = PlanRelay({sequences, 1, 1.0F}, {});
  EXPECT_EQ(Forest(metadata), (std::vector<std::string>{
                                  "blocks 3 1 at 0 for 0 1 2 3 4 5 7", ">blocks 7 8 at 2 for 0 2 4",
                                  ">blocks 5 at 2 for 1 7", ">>blocks 9 at 4 for 2 4"}));
  EXPECT_EQ(metadata.paged, (Indices{6}));
  EXPECT_EQ(metadata.shares[4].blocks, 5U);
  EXPECT_EQ(metadata.shares[4].levels, 3U);
  EXPECT_EQ(metadata.shares[5].blocks, 2U) << "the rest of its prefix it reads alone";
  EXPECT_EQ(metadata.shares[6].levels, 0U);
  EXPECT_EQ(metadata.decision.why, "1 group of 7 on 3 levels");

  const RelayMetadata three = PlanRelay({sequences, 1, 1.0F}, {.min_sharers = 3});
  EXPECT_EQ(Forest(three), (std::vector<std::string>{"blocks 3 1 at 0 for 0 1 2 3 4 5 7",
                                                     ">blocks 7 8 at 2 for 0 2 4"}));
  EXPECT_EQ(three.shares[4].blocks, 4U);
}

TEST(PlanRelay, LevelsAreBounded) {
  // Each sequence goes one block further than the one before it.
  std::vector<BlockId> blocks(40);
  for (BlockId i = 0; i < blocks.size(); ++i) blocks[i] = 100 + i;
  std::vector<Sequence> sequences;
  for (size_t i = 1; i <= blocks.size(); ++i) {
    sequences.push_back(WithPrefix(blocks));
    sequences.back().prefix = sequences.back().prefix.first(i);
  }
  const RelayMetadata metadata = PlanRelay({sequences, 1, 1.0F}, {});
  EXPECT_EQ(metadata.groups.size(), size_t{kMaxRelayLevels});
  EXPECT_EQ(metadata.shares.back().levels, kMaxRelayLevels);
  EXPECT_EQ(metadata.shares.back().blocks, kMaxRelayLevels);
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
