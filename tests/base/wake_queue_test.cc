#include "base/wake_queue.h"

#include <gtest/gtest.h>
#include <poll.h>

#include <atomic>
#include <memory>
#include <thread>
#include <vector>

namespace kvrelay {
namespace {

bool Readable(int fd, int timeout_ms = 0) {
  pollfd p{.fd = fd, .events = POLLIN, .revents = 0};
  return ::poll(&p, 1, timeout_ms) == 1;
}

TEST(WakeQueue, ItemsComeOutInOrderAndTheDescriptorFollows) {
  WakeQueue<std::unique_ptr<int>> queue(8);
  EXPECT_FALSE(Readable(queue.fd()));
  EXPECT_TRUE(queue.Push(std::make_unique<int>(1)));
  EXPECT_TRUE(queue.Push(std::make_unique<int>(2)));
  EXPECT_TRUE(Readable(queue.fd()));
  EXPECT_EQ(queue.ApproximateSize(), 2U);

  std::vector<std::unique_ptr<int>> items;
  EXPECT_EQ(queue.DrainInto(items), 2U);
  EXPECT_EQ(*items[0], 1);
  EXPECT_EQ(*items[1], 2);
  EXPECT_FALSE(Readable(queue.fd()));
  EXPECT_EQ(queue.ApproximateSize(), 0U);
  EXPECT_EQ(queue.DrainInto(items), 0U);
}

TEST(WakeQueue, AFullQueueRefusesAndTakesAgainOnceDrained) {
  WakeQueue<int> queue(2);
  EXPECT_TRUE(queue.Push(1));
  EXPECT_TRUE(queue.Push(2));
  EXPECT_FALSE(queue.Push(3));
  std::vector<int> items;
  queue.DrainInto(items);
  EXPECT_EQ(items, (std::vector<int>{1, 2}));
  EXPECT_TRUE(queue.Push(4));
}

TEST(WakeQueue, WhatALimitLeavesBehindKeepsItsSignal) {
  WakeQueue<int> queue(8);
  for (int i = 0; i < 5; ++i) EXPECT_TRUE(queue.Push(i));
  std::vector<int> items;
  EXPECT_EQ(queue.DrainInto(items, 3), 3U);
  EXPECT_TRUE(Readable(queue.fd()));
  EXPECT_EQ(queue.DrainInto(items, 3), 2U);
  EXPECT_FALSE(Readable(queue.fd()));
  EXPECT_EQ(items, (std::vector<int>{0, 1, 2, 3, 4}));
}

// A consumer that sleeps on the descriptor whenever the queue seems empty must never sleep through
// an item.
TEST(WakeQueue, NoWakeupIsLostBetweenManyProducersAndASleepingConsumer) {
  constexpr int kProducers = 4;
  constexpr int kEach = 5000;
  WakeQueue<std::pair<int, int>> queue(64);
  std::vector<std::thread> producers;
  for (int p = 0; p < kProducers; ++p) {
    producers.emplace_back([&queue, p] {
      for (int i = 0; i < kEach; ++i) {
        while (!queue.Push({p, i})) std::this_thread::yield();
      }
    });
  }
  std::vector<int> next(kProducers, 0);
  std::vector<std::pair<int, int>> items;
  for (int got = 0; got < kProducers * kEach;) {
    ASSERT_TRUE(Readable(queue.fd(), 10'000)) << "slept through an item after " << got;
    items.clear();
    got += static_cast<int>(queue.DrainInto(items, 16));
    for (const auto& [producer, number] : items) ASSERT_EQ(number, next[producer]++);
  }
  for (std::thread& producer : producers) producer.join();
  EXPECT_EQ(queue.ApproximateSize(), 0U);
}

// A consumer that looks before it sleeps may take an item while its producer is still in Push. A
// signal that stayed behind would wake it for ever.
TEST(WakeQueue, AnItemThatIsTakenAtOnceLeavesNoSignal) {
  constexpr int kItems = 20'000;
  WakeQueue<int> queue(8);
  std::atomic<int> pushed{0};
  std::atomic<int> checked{0};
  std::thread producer([&] {
    for (int i = 0; i < kItems; ++i) {
      while (checked < i) std::this_thread::yield();
      EXPECT_TRUE(queue.Push(i));
      pushed = i + 1;
    }
  });
  int left_behind = 0;
  std::vector<int> items;
  for (int i = 0; i < kItems; ++i) {
    for (int spins = 0; queue.ApproximateSize() == 0; ++spins) {
      if (spins > 10'000) std::this_thread::yield();
    }
    ASSERT_EQ(queue.DrainInto(items), 1U);
    while (pushed <= i) std::this_thread::yield();
    left_behind += Readable(queue.fd()) ? 1 : 0;
    checked = i + 1;
  }
  producer.join();
  EXPECT_EQ(left_behind, 0);
}

}  // namespace
}  // namespace kvrelay
