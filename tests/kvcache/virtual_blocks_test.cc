#include "kvcache/virtual_blocks.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <deque>
#include <set>

#include "kvcache/block_pool.h"
#include "tests/kvcache/seed.h"
#include "tests/kvcache/virtual_scene.h"

namespace kvrelay {
namespace {

using ::testing::ElementsAre;
using testing_support::kRowPage;
using testing_support::MakeVirtual;
using testing_support::Pick;
using testing_support::RowsOf;
using testing_support::SmallCache;
using testing_support::VirtualScene;

// A block is 16 KiB, 4 are a page; rows have 64.
std::shared_ptr<BlockPool> PoolOn(const VirtualScene& scene) {
  return BlockPool::Create(std::make_unique<VirtualBlocks>(scene.cache));
}

TEST(VirtualBlocks, ATableIsTheStartOfARow) {
  const VirtualScene scene = SmallCache(12, "blocks-1");
  const auto pool = PoolOn(scene);
  const BlockTable a = pool->Allocate(3).value();
  const BlockTable b = pool->Allocate(5, 1).value();
  EXPECT_THAT(a.blocks(), ElementsAre(0, 1, 2));
  EXPECT_THAT(b.blocks(), ElementsAre(64, 65, 66, 67, 68));
  EXPECT_EQ(scene.resident(), 2 * kRowPage) << "where they can be written now";
}

TEST(VirtualBlocks, ItsRowIsFreeWhenNobodyHoldsAnyOfIt) {
  const VirtualScene scene = SmallCache(12, "blocks-2");
  const auto pool = PoolOn(scene);
  // A page may be wasted by the second table of a request.
  EXPECT_EQ(pool->num_blocks(), 11U * 4);
  EXPECT_EQ(pool->free_blocks(), 11U * 4);
  BlockTable all = pool->Allocate(32).value();
  EXPECT_EQ(pool->free_blocks(), 3U * 4);
  BlockTable middle = all.Share(6, 4);
  all.Reset();
  EXPECT_EQ(pool->free_blocks(), 8U * 4) << "10 blocks are still promised: 3 pages";
  EXPECT_EQ(pool->used_blocks(), 4U);
  middle.Reset();
  EXPECT_EQ(pool->used_blocks(), 0U);
  EXPECT_EQ(scene.resident(), 8 * kRowPage) << "kept for the next";
}

TEST(VirtualBlocks, SaysWhatNeverAndWhatNotNow) {
  const VirtualScene scene = SmallCache(100, "blocks-3");
  const auto pool = PoolOn(scene);
  EXPECT_EQ(pool->Allocate(65).error().code(), Code::kTooLarge) << "longer than a row";
  EXPECT_EQ(pool->Allocate(1000).error().code(), Code::kTooLarge);
  std::vector<BlockTable> tables;
  for (int i = 0; i < 3; ++i) tables.push_back(pool->Allocate(1).value());
  EXPECT_EQ(pool->free_blocks(), 0U) << "a request may need two rows";
  tables.push_back(pool->Allocate(1).value());
  EXPECT_EQ(pool->Allocate(1).error().code(), Code::kOverloaded);
}

// Two tables that are as large together as what is free: always.
TEST(VirtualBlocks, TwoTablesOfAllThatIsFreeCanBeTaken) {
  for (uint32_t pages = 2; pages < 12; ++pages) {
    const VirtualScene scene = SmallCache(pages, "blocks-4");
    const auto pool = PoolOn(scene);
    const uint32_t all = pool->free_blocks();
    for (uint32_t first = 1; first < all; ++first) {
      const auto a = pool->Allocate(first);
      const auto b = pool->Allocate(all - first);
      ASSERT_TRUE(a.has_value() && b.has_value()) << first << " of " << all;
    }
  }
}

TEST(VirtualBlocks, NoBlockIsInTwoHands) {
  testing_support::Random random(testing_support::TestSeed());
  const VirtualScene scene = MakeVirtual({RowsOf(7, 400, false)}, 4 * 20 * kRowPage, "blocks-5");
  const auto pool = PoolOn(scene);
  std::deque<BlockTable> tables;
  std::multiset<BlockId> held;
  for (int i = 0; i < 2000; ++i) {
    const uint32_t action = Pick(random, 0, 3);
    if (action == 0 && !tables.empty()) {
      BlockTable& from = tables[Pick(random, 0, static_cast<uint32_t>(tables.size() - 1))];
      const uint32_t first = Pick(random, 0, static_cast<uint32_t>(from.size()));
      const uint32_t count = Pick(random, 0, static_cast<uint32_t>(from.size()) - first);
      BlockTable shared = from.Share(first, count);
      held.insert(shared.blocks().begin(), shared.blocks().end());
      tables.push_back(std::move(shared));
    } else if (action == 1 && !tables.empty()) {
      for (const BlockId block : tables.front().blocks()) held.erase(held.find(block));
      tables.pop_front();
    } else {
      const uint32_t count = Pick(random, 1, 25);
      const uint32_t free = pool->free_blocks();
      auto table = pool->Allocate(count, Pick(random, 0, count));
      ASSERT_TRUE(table.has_value() || count > free);
      if (!table) continue;
      for (const BlockId block : table->blocks()) ASSERT_FALSE(held.contains(block)) << block;
      held.insert(table->blocks().begin(), table->blocks().end());
      tables.push_back(std::move(table).value());
    }
  }
  tables.clear();
  EXPECT_EQ(pool->free_blocks(), pool->num_blocks());
}

}  // namespace
}  // namespace kvrelay
