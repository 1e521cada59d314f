#include "kvcache/prefix_store.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <atomic>
#include <thread>

#include "tests/kvcache/seed.h"

namespace kvrelay {
namespace {

ContentHash Hash(uint32_t n) {
  ContentHash hash;
  for (int i = 0; i < 4; ++i) hash.bytes[i] = static_cast<uint8_t>(n >> (8 * i));
  hash.bytes[15] = 1;
  return hash;
}

class SystemPrefixStoreTest : public ::testing::Test {
 protected:
  PrefixRef Insert(SystemPrefixStore& store, uint32_t n, uint32_t blocks = 1) {
    return store.Insert({Hash(n), blocks * 16, pool_->Allocate(blocks).value(), {}, false, {}});
  }
  const std::shared_ptr<BlockPool> pool_ = BlockPool::Create(256);
};

TEST_F(SystemPrefixStoreTest, FindsWhatWasInserted) {
  SystemPrefixStore store(10);
  EXPECT_EQ(store.Find(Hash(1)), nullptr);
  const PrefixRef inserted = Insert(store, 1, 2);
  const PrefixRef found = store.Find(Hash(1));
  EXPECT_EQ(found, inserted);
  EXPECT_EQ(found->hash, Hash(1));
  EXPECT_EQ(found->tokens, 32U);
  EXPECT_EQ(found->blocks.size(), 2U);
  EXPECT_EQ(store.hits(), 1U);
  EXPECT_EQ(store.size(), 1U);
}

TEST_F(SystemPrefixStoreTest, SecondInsertReturnsTheFirstAndGivesItsBlocksBack) {
  SystemPrefixStore store(10);
  const PrefixRef first = Insert(store, 1, 2);
  EXPECT_EQ(Insert(store, 1, 2), first);
  EXPECT_EQ(store.size(), 1U);
  EXPECT_EQ(pool_->used_blocks(), 2U);
}

TEST_F(SystemPrefixStoreTest, At101OfAHundredTheLeastRecentlyUsedGoes) {
  SystemPrefixStore store(100);
  for (uint32_t n = 0; n < 100; ++n) Insert(store, n);
  EXPECT_EQ(store.size(), 100U);
  EXPECT_EQ(store.evictions(), 0U);
  store.Find(Hash(0));  // 1 is the least recently used now
  Insert(store, 100);
  EXPECT_EQ(store.size(), 100U);
  EXPECT_EQ(store.evictions(), 1U);
  EXPECT_EQ(store.Find(Hash(1)), nullptr);
  EXPECT_NE(store.Find(Hash(0)), nullptr);
  EXPECT_NE(store.Find(Hash(100)), nullptr);
  EXPECT_EQ(pool_->used_blocks(), 100U);
}

TEST_F(SystemPrefixStoreTest, ReferencedOnesStayAndGoAsSoonAsTheyCan) {
  SystemPrefixStore store(100);
  std::vector<PrefixRef> held;
  for (uint32_t n = 0; n < 100; ++n) {
    const PrefixRef prefix = Insert(store, n);
    if (n < 2) held.push_back(prefix);
  }
  Insert(store, 100);
  EXPECT_EQ(store.Find(Hash(2)), nullptr) << "the oldest without references";
  EXPECT_EQ(held[0]->blocks.size(), 1U);

  // All referenced: more than the limit stay.
  for (uint32_t n = 3; n <= 100; ++n) held.push_back(store.Find(Hash(n)));
  held.push_back(Insert(store, 101));
  EXPECT_EQ(store.size(), 101U);
  EXPECT_EQ(pool_->used_blocks(), 101U);
  EXPECT_FALSE(store.EvictOne());
  store.Trim();
  EXPECT_EQ(store.size(), 101U);

  held.clear();
  EXPECT_EQ(store.size(), 101U) << "nothing happens behind the owner's back";
  store.Trim();
  EXPECT_EQ(store.size(), 100U);
  EXPECT_EQ(store.Find(Hash(0)), nullptr);
  EXPECT_EQ(pool_->used_blocks(), 100U);
}

TEST_F(SystemPrefixStoreTest, EvictOneFreesBlocksForOthers) {
  SystemPrefixStore store(100);
  const PrefixRef held = Insert(store, 1, 100);
  Insert(store, 2, 100);
  EXPECT_FALSE(pool_->Allocate(100).has_value());
  EXPECT_TRUE(store.EvictOne());
  EXPECT_TRUE(pool_->Allocate(100).has_value());
  EXPECT_FALSE(store.EvictOne());
  EXPECT_NE(store.Find(Hash(1)), nullptr);
}

TEST_F(SystemPrefixStoreTest, ReferenceOutlivesTheStore) {
  PrefixRef held;
  {
    SystemPrefixStore store(1);
    held = Insert(store, 1, 3);
    Insert(store, 2, 3);
  }
  EXPECT_EQ(held->blocks.size(), 3U);
  EXPECT_EQ(pool_->used_blocks(), 3U);
}

TEST_F(SystemPrefixStoreTest, ListsMostRecentlyUsedFirst) {
  SystemPrefixStore store(10);
  const PrefixRef one = Insert(store, 1, 2);
  Insert(store, 2);
  Insert(store, 3);
  const PrefixRef again = store.Find(Hash(1));
  const auto list = store.List();
  ASSERT_EQ(list.size(), 3U);
  EXPECT_EQ(list[0].hash, Hash(1));
  EXPECT_EQ(list[0].tokens, 32U);
  EXPECT_EQ(list[0].references, 2U);
  EXPECT_EQ(list[0].hits, 1U);
  EXPECT_EQ(list[1].hash, Hash(3));
  EXPECT_EQ(list[2].hash, Hash(2));
  EXPECT_EQ(list[2].references, 0U);
}

TEST_F(SystemPrefixStoreTest, ClearKeepsOnlyReferencedOnes) {
  SystemPrefixStore store(10);
  const PrefixRef one = Insert(store, 1);
  Insert(store, 2);
  store.Clear();
  EXPECT_EQ(store.size(), 1U);
  EXPECT_EQ(pool_->used_blocks(), 1U);
}

TEST_F(SystemPrefixStoreTest, AStoreOfNoneKeepsOnlyWhatIsHeld) {
  SystemPrefixStore store(0);
  PrefixRef one = Insert(store, 1);
  EXPECT_EQ(store.size(), 1U);
  one.reset();
  Insert(store, 2);
  EXPECT_EQ(store.Find(Hash(1)), nullptr);
}

TEST_F(SystemPrefixStoreTest, AnyThreadMayUseIt) {
  SystemPrefixStore store(8);
  const uint64_t seed = testing_support::TestSeed();
  std::atomic<int> bad = 0;
  std::vector<std::thread> threads;
  for (uint64_t t = 0; t < 4; ++t) {
    threads.emplace_back([&, t] {
      testing_support::Random random(seed + t);
      for (int i = 0; i < 3000; ++i) {
        const uint32_t n = testing_support::Pick(random, 0, 15);
        PrefixRef prefix = store.Find(Hash(n));
        if (prefix == nullptr) prefix = Insert(store, n, 4);
        bad += prefix->hash != Hash(n) || prefix->blocks.size() != 4;
        if (i % 16 == 0) store.EvictOne();
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  EXPECT_EQ(bad, 0);
  store.Trim();
  EXPECT_LE(store.size(), 8U);
  EXPECT_EQ(pool_->used_blocks(), store.size() * 4);
}

}  // namespace
}  // namespace kvrelay
