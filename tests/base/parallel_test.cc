#include "base/parallel.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <map>
#include <mutex>
#include <numeric>
#include <set>
#include <span>
#include <thread>
#include <vector>

#include "base/cpu.h"
#include "base/numa.h"

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

// A machine of two nodes, or so it is told; which part is where says the test.
class ParallelNear : public Parallel {
 protected:
  static constexpr size_t kGrain = 8;
  static constexpr size_t kParts = 100;

  ParallelNear() { SetParallelism(4); }
  ~ParallelNear() override { SetNumaTopology({}); }

  // Nodes 3 and 5, for one thread and for two.
  static void TellOfTwoNodes() {
    SetNumaTopology(
        {.nodes = {{.id = 3, .binding = -1, .threads = 1}, {.id = 5, .binding = -1, .threads = 2}},
         .locate = [](std::span<const void* const> pages, std::span<int> nodes) {
           for (size_t i = 0; i < pages.size(); ++i) {
             nodes[i] = *static_cast<const int*>(pages[i]);
           }
         }});
  }
};

TEST_F(ParallelNear, CoversAllOnceAndKeepsToTheThreadsOfEachNode) {
  TellOfTwoNodes();
  // Of three parts one is on node 3; every tenth is nowhere.
  std::vector<int> node_of_part(kParts);
  for (size_t i = 0; i < kParts; ++i) node_of_part[i] = i % 10 == 9 ? -2 : i % 3 == 0 ? 3 : 5;
  constexpr size_t kCount = kParts * kGrain - 3;
  std::vector<int> hits(kCount, 0);
  std::mutex mutex;
  std::map<int, int> running;
  std::map<int, int> most;
  ParallelForNear(
      kCount, kGrain,
      [&](size_t begin) {
        EXPECT_EQ(begin % kGrain, 0U);
        return &node_of_part[begin / kGrain];
      },
      [&](size_t begin, size_t end) {
        EXPECT_EQ(begin % kGrain, 0U);
        EXPECT_EQ(end, std::min(begin + kGrain, kCount));
        const int node = node_of_part[begin / kGrain];
        const auto count = [&](int change) {
          const std::lock_guard lock(mutex);
          running[node] += change;
          most[node] = std::max(most[node], running[node]);
        };
        count(+1);
        for (size_t i = begin; i < end; ++i) ++hits[i];
        std::this_thread::sleep_for(std::chrono::microseconds(200));
        count(-1);
      });
  EXPECT_EQ(hits, std::vector<int>(kCount, 1));
  EXPECT_EQ(most[3], 1);
  EXPECT_LE(most[5], 2);
  EXPECT_LE(most[-2], 4);
}

TEST_F(ParallelNear, ManyCallersAtOnce) {
  TellOfTwoNodes();
  const int nodes[] = {3, 5};
  std::atomic<uint64_t> total{0};
  std::vector<std::thread> callers;
  for (int caller = 0; caller < 4; ++caller) {
    callers.emplace_back([&] {
      for (int round = 0; round < 50; ++round) {
        ParallelForNear(
            64, 4, [&](size_t begin) { return &nodes[begin / 4 % 2]; },
            [&](size_t begin, size_t end) { total += end - begin; });
      }
    });
  }
  for (std::thread& caller : callers) caller.join();
  EXPECT_EQ(total, 4U * 50 * 64);
}

TEST_F(ParallelNear, NobodyIsAskedWhereAllMemoryIsEquallyNear) {
  SetNumaTopology({});
  std::atomic<size_t> covered{0};
  ParallelForNear(
      1000, 10,
      [](size_t) -> const void* {
        ADD_FAILURE() << "asked";
        return nullptr;
      },
      [&](size_t begin, size_t end) { covered += end - begin; });
  EXPECT_EQ(covered, 1000U);
}

}  // namespace
}  // namespace kvrelay
