#include "base/parallel.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <mutex>
#include <numeric>
#include <set>
#include <thread>
#include <vector>

#include "base/cpu.h"

namespace kvrelay {
namespace {

class Parallel : public testing::Test {
 protected:
  ~Parallel() override { SetParallelism(AvailableThreads()); }
};

TEST_F(Parallel, CoversEveryIndexOnceInRangesOfAtMostTheGrain) {
  for (const int threads : {1, 2, 4}) {
    SetParallelism(threads);
    for (const size_t count : {0, 1, 7, 8, 9, 1000}) {
      for (const size_t grain : {0, 1, 8, 5000}) {
        std::vector<int> hits(count, 0);  // each element is written by one range only
        ParallelFor(count, grain, [&, grain](size_t begin, size_t end) {
          EXPECT_LT(begin, end);
          EXPECT_LE(end - begin, std::max<size_t>(grain, 1));
          for (size_t i = begin; i < end; ++i) ++hits[i];
        });
        EXPECT_EQ(hits, std::vector<int>(count, 1)) << threads << ' ' << count << ' ' << grain;
      }
    }
  }
}

// Plain variables on both sides: under TSan this fails unless both edges are seen.
TEST_F(Parallel, WritesBeforeAreSeenInsideAndWritesInsideAfterwards) {
  SetParallelism(4);
  for (int round = 0; round < 200; ++round) {
    const auto input = std::make_unique<std::vector<int>>(256, round);
    std::vector<int> output(256);
    ParallelFor(256, 1, [&](size_t begin, size_t end) {
      for (size_t i = begin; i < end; ++i) output[i] = (*input)[i] + 1;
    });
    ASSERT_EQ(std::accumulate(output.begin(), output.end(), 0), 256 * (round + 1));
  }
}

TEST_F(Parallel, UsesAsManyThreadsAsAllowedAndNoMore) {
  SetParallelism(3);
  EXPECT_EQ(Parallelism(), 3);
  std::mutex mutex;
  std::set<std::thread::id> seen;
  const auto seen_by_now = [&] {
    const std::lock_guard lock(mutex);
    seen.insert(std::this_thread::get_id());
    return seen.size();
  };
  // On a busy machine a worker takes its time to wake: a range waits for it. (The third may come
  // later than the work.)
  const auto patience = std::chrono::steady_clock::now() + std::chrono::seconds(20);
  std::atomic<int> running{0};
  std::atomic<int> most{0};
  ParallelFor(60, 1, [&](size_t, size_t) {
    const int now = ++running;
    int before = most;
    while (before < now && !most.compare_exchange_weak(before, now)) {
    }
    while (seen_by_now() < 2 && std::chrono::steady_clock::now() < patience) {
      std::this_thread::sleep_for(std::chrono::milliseconds(1));
    }
    std::this_thread::sleep_for(std::chrono::milliseconds(1));
    --running;
  });
  EXPECT_LE(most, 3);
  EXPECT_GE(seen.size(), 2U);
}

TEST_F(Parallel, OneThreadRunsInOrderOnTheCaller) {
  SetParallelism(0);
  EXPECT_EQ(Parallelism(), 1);
  std::vector<size_t> begins;
  ParallelFor(10, 4, [&, self = std::this_thread::get_id()](size_t begin, size_t) {
    EXPECT_EQ(std::this_thread::get_id(), self);
    begins.push_back(begin);
  });
  EXPECT_EQ(begins, (std::vector<size_t>{0, 4, 8}));
}

TEST_F(Parallel, ManyCallersShareThePoolAndNest) {
  SetParallelism(2);
  std::atomic<uint64_t> total{0};
  std::vector<std::thread> callers;
  for (int caller = 0; caller < 6; ++caller) {
    callers.emplace_back([&] {
      for (int round = 0; round < 20; ++round) {
        ParallelFor(16, 1, [&](size_t begin, size_t end) {
          for (size_t i = begin; i < end; ++i) {
            ParallelFor(8, 2, [&](size_t b, size_t e) { total += e - b; });
          }
        });
      }
    });
  }
  for (std::thread& caller : callers) caller.join();
  EXPECT_EQ(total, 6U * 20 * 16 * 8);
}

TEST_F(Parallel, TheNumberMayChangeWhileOthersRun) {
  std::atomic<bool> stop{false};
  std::thread worker([&] {
    while (!stop) {
      std::atomic<size_t> sum{0};
      ParallelFor(64, 1, [&](size_t begin, size_t end) { sum += end - begin; });
      ASSERT_EQ(sum, 64U);
    }
  });
  for (int i = 0; i < 50; ++i) SetParallelism(1 + i % 4);
  stop = true;
  worker.join();
}

}  // namespace
}  // namespace kvrelay
