#include "kvcache/block_pool.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <atomic>
#include <thread>

#include "tests/kvcache/seed.h"

namespace kvrelay {
namespace {

using ::testing::AllOf;
using ::testing::ElementsAre;
using ::testing::HasSubstr;

std::vector<BlockId> Ids(const BlockTable& table) {
  return {table.blocks().begin(), table.blocks().end()};
}

TEST(BlockPool, GivesAllOrNothing) {
  const auto pool = BlockPool::Create(5);
  BlockTable three = pool->Allocate(3).value();
  EXPECT_EQ(pool->free_blocks(), 2U);
  EXPECT_EQ(pool->used_blocks(), 3U);

  const auto more = pool->Allocate(3);
  ASSERT_FALSE(more.has_value());
  EXPECT_EQ(more.error().code(), Code::kOverloaded);
  EXPECT_THAT(more.error().message(), AllOf(HasSubstr("for 3"), HasSubstr("2 of 5")));
  EXPECT_EQ(pool->free_blocks(), 2U);

  const auto never = pool->Allocate(6);
  ASSERT_FALSE(never.has_value());
  EXPECT_EQ(never.error().code(), Code::kTooLarge);
  EXPECT_THAT(never.error().message(), AllOf(HasSubstr("for 6"), HasSubstr("has 5")));

  three.Reset();
  EXPECT_EQ(pool->free_blocks(), 5U);
  EXPECT_TRUE(pool->Allocate(5).has_value());
  EXPECT_TRUE(pool->Allocate(0)->empty());
}

TEST(BlockPool, GivesWhatWasFreeLongestFirst) {
  const auto pool = BlockPool::Create(4);
  BlockTable a = pool->Allocate(2).value();
  EXPECT_THAT(Ids(a), ElementsAre(0, 1));
  a.Reset();
  BlockTable b = pool->Allocate(1).value();
  EXPECT_THAT(Ids(b), ElementsAre(2));
  b.Reset();
  EXPECT_THAT(Ids(pool->Allocate(4).value()), ElementsAre(3, 0, 1, 2));
}

TEST(BlockTable, SharedBlocksComeBackWithTheLastHolder) {
  const auto pool = BlockPool::Create(4);
  BlockTable first = pool->Allocate(3).value();
  {
    BlockTable second = first.Share();
    EXPECT_EQ(Ids(second), Ids(first));
    first.Reset();
    EXPECT_EQ(pool->used_blocks(), 3U);
    first = second.Share();
  }
  EXPECT_EQ(pool->used_blocks(), 3U);
  first.Reset();
  first.Reset();
  EXPECT_EQ(pool->used_blocks(), 0U);
}

TEST(BlockTable, MovesItsReferencesAlong) {
  const auto pool = BlockPool::Create(4);
  BlockTable a = pool->Allocate(2).value();
  BlockTable b = std::move(a);
  EXPECT_TRUE(a.empty());  // NOLINT(bugprone-use-after-move): a moved-from table is empty
  a.Reset();
  EXPECT_EQ(pool->used_blocks(), 2U);
  b = pool->Allocate(1).value();
  EXPECT_THAT(Ids(b), ElementsAre(2));
  EXPECT_EQ(pool->used_blocks(), 1U);
}

TEST(BlockTable, AppendTakesOverTheTail) {
  const auto pool = BlockPool::Create(6);
  BlockTable table;
  table.Append(pool->Allocate(2).value());
  table.Append(pool->Allocate(1).value());
  table.Append(BlockTable());
  EXPECT_THAT(Ids(table), ElementsAre(0, 1, 2));
  EXPECT_EQ(pool->used_blocks(), 3U);

  // A shared prefix and own blocks behind it.
  BlockTable request = table.Share();
  request.Append(pool->Allocate(2).value());
  table.Reset();
  EXPECT_EQ(pool->used_blocks(), 5U);
  request.Reset();
  EXPECT_EQ(pool->used_blocks(), 0U);
}

TEST(BlockTable, KeepsThePoolAlive) {
  auto pool = BlockPool::Create(2);
  BlockTable table = pool->Allocate(2).value();
  pool.reset();
  EXPECT_EQ(table.Share().size(), 2U);
}

TEST(BlockPool, NoBlockIsEverInTwoHands) {
  constexpr uint32_t kBlocks = 64;
  const uint64_t seed = testing_support::TestSeed();
  const auto pool = BlockPool::Create(kBlocks);
  std::vector<std::atomic<int>> holders(kBlocks);
  std::atomic<int> clashes = 0;
  std::vector<std::thread> threads;
  for (uint64_t t = 0; t < 4; ++t) {
    threads.emplace_back([&, t] {
      testing_support::Random random(seed + t);
      for (int i = 0; i < 5000; ++i) {
        auto table = pool->Allocate(testing_support::Pick(random, 1, 30));
        if (!table) continue;
        for (const BlockId block : table->blocks()) clashes += holders[block].fetch_add(1) != 0;
        BlockTable share = table->Share();
        table->Reset();
        for (const BlockId block : share.blocks()) holders[block].fetch_sub(1);
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  EXPECT_EQ(clashes, 0);
  EXPECT_EQ(pool->free_blocks(), kBlocks);
}

}  // namespace
}  // namespace kvrelay
