#include "kvcache/conversation_store.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <numeric>
#include <random>
#include <thread>

#include "tests/kvcache/seed.h"

namespace kvrelay {
namespace {

using Tokens = std::vector<uint32_t>;

// `count` ids of conversation `name`.
Tokens Some(uint32_t name, uint32_t count) {
  Tokens tokens(count);
  std::iota(tokens.begin(), tokens.end(), name * 1000);
  return tokens;
}

class ConversationStoreTest : public ::testing::Test {
 protected:
  static constexpr uint32_t kBlock = 16;

  void Keep(ConversationStore& store, Tokens tokens, PrefixRef prefix = nullptr) {
    const uint32_t shared = prefix ? prefix->tokens : 0;
    const auto own = static_cast<uint32_t>(tokens.size()) - shared;
    store.Keep({.tokens = std::move(tokens),
                .prefix = std::move(prefix),
                .blocks = pool_->Allocate((own + kBlock - 1) / kBlock).value()},
               now_);
  }
  uint32_t used() const { return pool_->used_blocks(); }

  const std::shared_ptr<BlockPool> pool_ = BlockPool::Create(64);
  TimePoint now_{Millis(1000)};
};

TEST_F(ConversationStoreTest, FindsTheLongestCommonStart) {
  ConversationStore store({.max_blocks = 20, .ttl = Millis(100)});
  Tokens branch = Some(1, 20);
  branch.push_back(7);
  Keep(store, Some(1, 40));
  Keep(store, branch);
  Keep(store, Some(2, 30));

  Tokens next = Some(1, 40);
  next.push_back(9);
  const ConversationStore::Match whole = store.Find(next, now_);
  EXPECT_EQ(whole.tokens, 40U);
  EXPECT_EQ(whole.conversation->tokens, Some(1, 40));
  branch.push_back(8);
  EXPECT_EQ(store.Find(branch, now_).tokens, 21U);
  EXPECT_EQ(store.Find(Some(2, 10), now_).tokens, 10U) << "an earlier turn is asked again";
  EXPECT_EQ(store.Find(Some(3, 10), now_).conversation, nullptr);
  EXPECT_EQ(store.Find({}, now_).conversation, nullptr);
}

TEST_F(ConversationStoreTest, ATurnTakesThePlaceOfTheOneBefore) {
  ConversationStore store({.max_blocks = 20, .ttl = Millis(100)});
  Keep(store, Some(1, 20));
  Keep(store, Some(2, 20));
  Keep(store, Some(1, 40));
  EXPECT_EQ(store.info().conversations, 2U);
  EXPECT_EQ(store.info().blocks, 5U);
  EXPECT_EQ(used(), 5U);
  EXPECT_EQ(store.info().evictions, 0U) << "continued, not evicted";
}

TEST_F(ConversationStoreTest, TheLeastRecentlyUsedGoesWhenAllAreTooMany) {
  ConversationStore store({.max_blocks = 6, .ttl = Millis(100)});
  for (uint32_t name = 1; name <= 3; ++name) Keep(store, Some(name, 32));
  EXPECT_EQ(store.Find(Some(1, 32), now_).tokens, 32U);
  Keep(store, Some(4, 17));
  EXPECT_EQ(store.Find(Some(2, 32), now_).conversation, nullptr) << "1 was used since";
  EXPECT_EQ(store.Find(Some(1, 32), now_).tokens, 32U);
  EXPECT_EQ(used(), 6U);
  Keep(store, Some(5, 7 * kBlock));
  EXPECT_EQ(store.info().conversations, 3U)
      << "larger than the store: it is not kept, all others are";
  EXPECT_EQ(used(), 6U);
  EXPECT_EQ(store.info().evictions, 1U);

  ConversationStore none({.max_blocks = 0, .ttl = Millis(100)});
  Keep(none, Some(1, 1));
  EXPECT_EQ(none.info().conversations, 0U);
}

TEST_F(ConversationStoreTest, EachIsKeptForAWhileAfterItsLastUse) {
  ConversationStore store({.max_blocks = 20, .ttl = Millis(100)});
  EXPECT_EQ(store.NextExpiry(), TimePoint::max());
  Keep(store, Some(1, 16));
  now_ += Millis(60);
  Keep(store, Some(2, 16));
  EXPECT_EQ(store.NextExpiry(), now_ + Millis(40));
  EXPECT_EQ(store.Find(Some(1, 16), now_).tokens, 16U);
  EXPECT_EQ(store.NextExpiry(), now_ + Millis(100)) << "1 has its time again";
  now_ += Millis(100);
  EXPECT_EQ(store.Find(Some(1, 16), now_).conversation, nullptr) << "over, though still there";
  store.Expire(now_);
  EXPECT_EQ(store.info().conversations, 0U);
  EXPECT_EQ(store.info().expired, 2U);
  EXPECT_EQ(used(), 0U);
}

TEST_F(ConversationStoreTest, PressureFreesAllButWhatIsInUse) {
  ConversationStore store({.max_blocks = 20, .ttl = Millis(100)});
  Keep(store, Some(1, 32));
  Keep(store, Some(2, 48));
  ConversationRef in_use = store.Find(Some(2, 48), now_).conversation;
  EXPECT_TRUE(store.EvictOne());
  EXPECT_EQ(used(), 3U);
  EXPECT_TRUE(store.EvictOne());
  EXPECT_EQ(used(), 3U) << "a reader still has them";
  EXPECT_FALSE(store.EvictOne());
  in_use.reset();
  EXPECT_EQ(used(), 0U);
}

TEST_F(ConversationStoreTest, SharesBlocksAcrossThePrefix) {
  SystemPrefixStore prefixes(10);
  const PrefixRef prefix =
      prefixes.Insert({{}, 2 * kBlock, pool_->Allocate(2).value(), {}, false, {}});
  ConversationStore store({.max_blocks = 20, .ttl = Millis(100)});
  Keep(store, Some(1, 80), prefix);  // 2 blocks of the prefix, 3 of its own
  const ConversationRef kept = store.Find(Some(1, 80), now_).conversation;
  std::vector<BlockId> all(prefix->blocks.blocks().begin(), prefix->blocks.blocks().end());
  all.insert(all.end(), kept->blocks.blocks().begin(), kept->blocks.blocks().end());
  for (size_t first = 0; first <= all.size(); ++first) {
    for (size_t count = 0; count <= all.size() - first; ++count) {
      const BlockTable shared = kept->Share(first, count);
      EXPECT_TRUE(std::ranges::equal(shared.blocks(), std::span(all).subspan(first, count)))
          << first << " +" << count;
    }
  }
  EXPECT_EQ(store.info().blocks, 3U) << "without the prefix's";
}

TEST_F(ConversationStoreTest, ThreadsKeepFindAndEvictAtTheSameTime) {
  const uint64_t seed = testing_support::TestSeed();
  {
    ConversationStore store({.max_blocks = 30, .ttl = Millis(2)});
    std::vector<std::thread> threads;
    for (uint32_t t = 0; t < 4; ++t) {
      threads.emplace_back([&, t] {
        std::mt19937_64 random(seed + t);
        for (int i = 0; i < 2000; ++i) {
          const TimePoint now = now_ + std::chrono::microseconds(i);
          const auto name = static_cast<uint32_t>(random() % 6);
          const auto count = static_cast<uint32_t>(1 + random() % 60);
          auto blocks = pool_->Allocate((count + kBlock - 1) / kBlock);
          if (blocks) store.Keep({.tokens = Some(name, count), .blocks = std::move(*blocks)}, now);
          const ConversationStore::Match match = store.Find(Some(name, 60), now);
          if (match.conversation) {
            EXPECT_EQ(match.conversation->Share(0, 1).size(), 1U);
          }
          if (random() % 4 == 0) store.EvictOne();
          if (random() % 4 == 0) store.Expire(now);
        }
      });
    }
    for (std::thread& thread : threads) thread.join();
    EXPECT_LE(store.info().blocks, 30U);
  }
  EXPECT_EQ(used(), 0U);
}

}  // namespace
}  // namespace kvrelay
