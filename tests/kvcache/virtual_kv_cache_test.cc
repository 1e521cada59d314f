#include "kvcache/virtual_kv_cache.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cstring>
#include <thread>
#include <vector>

#include "tests/common/slowness.h"
#include "tests/kvcache/resident.h"
#include "tests/kvcache/seed.h"
#include "tests/kvcache/virtual_scene.h"

namespace kvrelay {
namespace {

using ::testing::AllOf;
using ::testing::HasSubstr;
using testing_support::kRowPage;
using testing_support::MakeVirtual;
using testing_support::Pick;
using testing_support::ResidentOf;
using testing_support::RowsOf;
using testing_support::SmallCache;
using testing_support::VirtualScene;

TEST(VirtualKvCache, HasMemoryWhereTokensAreAndAddressesForTheLongest) {
  const VirtualScene scene = MakeVirtual({RowsOf(4, 1024, false)}, 64 * kRowPage, "virtual-1");
  EXPECT_EQ(scene.cache->layout().bytes(), 4U * 4 * 16 * kRowPage);
  EXPECT_EQ(ResidentOf("virtual-1").bytes, 0U) << "reserving takes none";
  const uint32_t row = scene.cache->AllocNewBatchIdx(65).value();
  // 2 pages in each of 4 ranges: K and V of 2 layers.
  EXPECT_EQ(ResidentOf("virtual-1").bytes, 8 * kRowPage);
  ASSERT_TRUE(scene.cache->Extend(row, 128).ok());
  EXPECT_EQ(ResidentOf("virtual-1").bytes, 8 * kRowPage);
  ASSERT_TRUE(scene.cache->Extend(row, 129).ok());
  EXPECT_EQ(ResidentOf("virtual-1").bytes, 12 * kRowPage);
  EXPECT_EQ(ResidentOf("virtual-1").mappings, 1U);
}

TEST(VirtualKvCache, SaysWhatWasAskedAndWhatIsFree) {
  const VirtualScene scene = SmallCache(10, "virtual-2");
  ASSERT_TRUE(scene.cache->AllocNewBatchIdx(6 * 64).has_value());
  EXPECT_THAT(scene.cache->AllocNewBatchIdx(5 * 64).error().ToString(),
              AllOf(HasSubstr("kResourceExhausted"), HasSubstr("asked for 5 pages"),
                    HasSubstr("65536"), HasSubstr("4 of 10 are free")));
  const uint32_t row = scene.cache->AllocNewBatchIdx(4 * 64).value();
  EXPECT_EQ(scene.cache->Extend(row, 4 * 64 + 1).code(), Code::kResourceExhausted);
  EXPECT_TRUE(scene.cache->Extend(row, 4 * 64).ok());
  EXPECT_EQ(scene.cache->AllocNewBatchIdx(1025).error().code(), Code::kTooLarge);
  EXPECT_EQ(scene.cache->Extend(row, 1025).code(), Code::kTooLarge);
  ASSERT_TRUE(scene.cache->FreeBatchIdx(row).ok());
  EXPECT_EQ(scene.cache->FreeBatchIdx(row).code(), Code::kInvalidArgument);
  EXPECT_EQ(scene.cache->FreeBatchIdx(99).code(), Code::kInvalidArgument);
  EXPECT_EQ(scene.cache->Extend(row, 1).code(), Code::kInvalidArgument);
  EXPECT_EQ(scene.cache->Step(std::vector<uint32_t>(5)).code(), Code::kInvalidArgument);
  EXPECT_EQ(scene.cache->ReservePhysicalPages(kRowPage).code(), Code::kInvalidArgument);
}

TEST(VirtualKvCache, EndsWithItsRowsToo) {
  const VirtualScene scene = SmallCache(10, "virtual-3", 2);
  ASSERT_TRUE(scene.cache->AllocNewBatchIdx(1).has_value());
  ASSERT_TRUE(scene.cache->AllocNewBatchIdx(1).has_value());
  EXPECT_THAT(scene.cache->AllocNewBatchIdx(1).error().ToString(),
              AllOf(HasSubstr("kResourceExhausted"), HasSubstr("0 of 2")));
}

TEST(VirtualKvCache, AFailedStepTakesNothing) {
  const VirtualScene scene = SmallCache(4, "virtual-4");
  const uint32_t a = scene.cache->AllocNewBatchIdx(64).value();
  const uint32_t b = scene.cache->AllocNewBatchIdx(64).value();
  std::vector<uint32_t> lens(4);
  lens[a] = 2 * 64;
  lens[b] = 3 * 64;
  EXPECT_THAT(scene.cache->Step(lens).ToString(), HasSubstr("asked for 3 pages"));
  EXPECT_EQ(scene.resident(), 2 * kRowPage);
  lens[b] = 2 * 64;
  EXPECT_TRUE(scene.cache->Step(lens).ok());
}

TEST(VirtualKvCache, AFreedRowsPagesWaitForTheNextSequence) {
  const VirtualScene scene = SmallCache(16, "virtual-5");
  const uint32_t longer = scene.cache->AllocNewBatchIdx(6 * 64).value();
  const uint32_t shorter = scene.cache->AllocNewBatchIdx(3 * 64).value();
  ASSERT_TRUE(scene.cache->FreeBatchIdx(longer).ok());
  ASSERT_TRUE(scene.cache->FreeBatchIdx(shorter).ok());
  EXPECT_EQ(scene.resident(), 9 * kRowPage) << "nobody needs them";
  const uint64_t mapped = scene.cache->metrics().pages_mapped;

  EXPECT_EQ(scene.cache->AllocNewBatchIdx(2 * 64).value(), shorter) << "fits best";
  EXPECT_EQ(scene.cache->AllocNewBatchIdx(5 * 64).value(), longer);
  EXPECT_EQ(scene.cache->metrics().pages_mapped, mapped);
  EXPECT_EQ(scene.cache->metrics().pages_reused, 7U);
  EXPECT_EQ(scene.resident(), 9 * kRowPage);
}

TEST(VirtualKvCache, HolesArePunchedBesideALiveRow) {
  const VirtualScene scene = SmallCache(8, "virtual-6");
  const uint32_t first = scene.cache->AllocNewBatchIdx(3 * 64).value();
  const uint32_t live = scene.cache->AllocNewBatchIdx(3 * 64).value();
  std::memset(scene.At(first, 0), 1, 3 * kRowPage);
  std::memset(scene.At(live, 0), 2, 3 * kRowPage);
  ASSERT_TRUE(scene.cache->FreeBatchIdx(first).ok());

  // Of a pool of 8, 6 are mapped: a row of 5 takes the freed one's and 2 more.
  const uint32_t taker = scene.cache->AllocNewBatchIdx(5 * 64).value();
  EXPECT_EQ(taker, first);
  ASSERT_TRUE(scene.cache->FreeBatchIdx(taker).ok());
  ASSERT_TRUE(scene.cache->Extend(live, 6 * 64).ok());
  EXPECT_EQ(scene.resident(), 8 * kRowPage);
  EXPECT_EQ(scene.cache->metrics().pages_reclaimed, 3U);
  for (uint64_t i = 0; i < 3 * kRowPage; ++i) ASSERT_EQ(scene.At(live, 0)[i], std::byte{2}) << i;
  EXPECT_EQ(*scene.At(first, 0), std::byte{1}) << "from a row's end first";
}

TEST(VirtualKvCache, WhatIsPromisedIsNeverRefused) {
  const VirtualScene scene = SmallCache(10, "virtual-7");
  const uint32_t row = scene.cache->AllocNewBatchIdx(1, 8 * 64).value();
  EXPECT_EQ(scene.resident(), kRowPage);
  EXPECT_EQ(scene.cache->FreeTokens(), 2U * 64);
  const uint32_t other = scene.cache->AllocNewBatchIdx(2 * 64).value();
  EXPECT_FALSE(scene.cache->AllocNewBatchIdx(1).has_value());
  EXPECT_FALSE(scene.cache->Extend(other, 3 * 64).ok());
  ASSERT_TRUE(scene.cache->Extend(row, 8 * 64).ok());
  EXPECT_EQ(scene.resident(), 10 * kRowPage);

  // Shorter after all: the others' now, whether it was mapped or not.
  scene.cache->Shrink(row, 3 * 64);
  EXPECT_EQ(scene.cache->FreeTokens(), 5U * 64);
  ASSERT_TRUE(scene.cache->Extend(other, 7 * 64).ok());
  EXPECT_EQ(scene.resident(), 10 * kRowPage);
}

TEST(VirtualKvCache, TheNextStepsPagesAreThereBeforeIt) {
  const VirtualScene scene = SmallCache(16, "virtual-8");
  const uint32_t row = scene.cache->AllocNewBatchIdx(64).value();
  std::vector<uint32_t> lens(4);
  lens[row] = 64;
  ASSERT_TRUE(scene.cache->StepAsync(lens).ok());
  scene.cache->WaitForBackground();
  EXPECT_EQ(scene.resident(), 2 * kRowPage) << "token 65's";
  EXPECT_EQ(scene.cache->metrics().pages_mapped_ahead, 1U);
  lens[row] = 65;
  ASSERT_TRUE(scene.cache->Step(lens).ok());
  EXPECT_EQ(scene.cache->metrics().pages_mapped, 2U) << "nothing left to the step";

  // Growing by 200 tokens, it is taken to grow so again.
  lens[row] = 265;
  ASSERT_TRUE(scene.cache->StepAsync(lens).ok());
  scene.cache->WaitForBackground();
  EXPECT_EQ(scene.resident(), 8 * kRowPage) << "of 465 tokens";
}

TEST(VirtualKvCache, NothingIsMappedBeyondWhatASequenceWillReach) {
  const VirtualScene scene = SmallCache(16, "virtual-14");
  const uint32_t row = scene.cache->AllocNewBatchIdx(0, 3 * 64).value();
  std::vector<uint32_t> lens(4);
  for (lens[row] = 100; lens[row] <= 192; lens[row] += 46) {
    ASSERT_TRUE(scene.cache->StepAsync(lens).ok());
    scene.cache->WaitForBackground();
    EXPECT_EQ(scene.resident(), 3 * kRowPage);
  }
}

TEST(VirtualKvCache, PagesAheadOfNeedAreNobodysLoss) {
  const VirtualScene scene = SmallCache(4, "virtual-9");
  const uint32_t row = scene.cache->AllocNewBatchIdx(64).value();
  std::vector<uint32_t> lens(4);
  lens[row] = 2 * 64;
  ASSERT_TRUE(scene.cache->StepAsync(lens).ok());
  scene.cache->WaitForBackground();
  EXPECT_EQ(scene.resident(), 3 * kRowPage);
  EXPECT_EQ(scene.cache->FreeTokens(), 2U * 64);
  EXPECT_TRUE(scene.cache->AllocNewBatchIdx(2 * 64).has_value());
  EXPECT_EQ(scene.resident(), 4 * kRowPage);
  // With everything promised there is nothing ahead, and that is no error.
  ASSERT_TRUE(scene.cache->StepAsync(lens).ok());
  scene.cache->WaitForBackground();
  EXPECT_EQ(scene.resident(), 4 * kRowPage);
}

TEST(VirtualKvCache, WhatALateReaderGaveMemoryIsTakenBack) {
  const VirtualScene scene = SmallCache(8, "virtual-10");
  const Region region = scene.memory[0]->AsRegion(scene.memory[0]->bytes()).value();
  const auto peer = MappedRegion::Map(UniqueFd(::dup(region.export_fd())), region.bytes()).value();
  const uint32_t row = scene.cache->AllocNewBatchIdx(64).value();
  const uint64_t outside = static_cast<uint64_t>(scene.At(row, 5 * 64) - scene.memory[0]->data());
  EXPECT_EQ(peer.data()[outside], std::byte{0});
  EXPECT_GT(scene.resident(), kRowPage);
  std::memset(scene.At(row, 0), 3, kRowPage);

  std::vector<uint32_t> lens(4);
  lens[row] = 10;
  ASSERT_TRUE(scene.cache->StepAsync(lens).ok());
  scene.cache->WaitForBackground();
  EXPECT_EQ(scene.resident(), kRowPage);
  EXPECT_GT(scene.cache->metrics().stray_bytes, 0U);
  EXPECT_EQ(*scene.At(row, 63), std::byte{3});
}

TEST(VirtualKvCache, RanksShareRowsAndEachHasPagesOfItsOwn) {
  VirtualKvShape three = RowsOf(4, 1024, true);
  three.num_layers = 6;
  const VirtualScene scene =
      MakeVirtual({three, RowsOf(4, 1024, true)}, 40 * kRowPage, "virtual-11");
  const uint32_t row = scene.cache->AllocNewBatchIdx(128).value();
  EXPECT_EQ(scene.memory[0]->resident_bytes(), 6 * kRowPage);
  EXPECT_EQ(scene.memory[1]->resident_bytes(), 2 * kRowPage);
  // 30 pages and 10 of a pool: 640 tokens on either.
  EXPECT_EQ(scene.cache->FreeTokens(), 512U);
  ASSERT_TRUE(scene.cache->Extend(row, 640).ok());
  EXPECT_THAT(scene.cache->Extend(row, 641).ToString(), HasSubstr("on rank 0"));
  ASSERT_TRUE(scene.cache->FreeBatchIdx(row).ok());
  EXPECT_EQ(scene.cache->FreeTokens(), scene.cache->CapacityTokens());
  // Two rows may each waste most of a page.
  EXPECT_EQ(scene.cache->CapacityTokens(2), 9U * 64);
}

TEST(VirtualKvCache, MetricsAreMeasured) {
  const VirtualScene scene = SmallCache(32, "virtual-12");
  const VirtualKvMetrics empty = scene.cache->metrics();
  EXPECT_EQ(empty.baseline_memory_mb, 4.0) << "4 rows of 1 MiB";
  EXPECT_EQ(empty.optimized_memory_mb, 0.0);
  EXPECT_EQ(empty.memory_savings_percent, 100.0);
  EXPECT_EQ(empty.utilization, 0.0);

  const uint32_t full = scene.cache->AllocNewBatchIdx(1024).value();
  ASSERT_TRUE(scene.cache->AllocNewBatchIdx(32).has_value());
  const VirtualKvMetrics two = scene.cache->metrics();
  EXPECT_EQ(two.optimized_memory_mb, 17.0 / 16);
  EXPECT_EQ(two.optimized_memory_mb * (1 << 20), ResidentOf("virtual-12").bytes);
  EXPECT_EQ(two.memory_saved_mb, 4 - 17.0 / 16);
  EXPECT_DOUBLE_EQ(two.memory_savings_percent, 100 * (4 - 17.0 / 16) / 4);
  EXPECT_DOUBLE_EQ(two.utilization, 1056.0 / 1088);
  EXPECT_DOUBLE_EQ(two.fragmentation, 1 - 1056.0 / 1088);
  EXPECT_EQ(two.cached_mb, 0.0);

  ASSERT_TRUE(scene.cache->FreeBatchIdx(full).ok());
  const VirtualKvMetrics one = scene.cache->metrics();
  EXPECT_EQ(one.cached_mb, 1.0);
  EXPECT_DOUBLE_EQ(one.utilization, 32.0 / 1088);
  EXPECT_DOUBLE_EQ(one.fragmentation, 0.5);
  EXPECT_EQ(one.pool_mb, 2.0);
}

TEST(VirtualKvCache, RefusesWhatDoesNotFitTogether) {
  const auto layout = VirtualLayout::Make(std::vector{RowsOf(2, 64, true)}).value().front();
  std::shared_ptr<SparseMemory> small = SparseMemory::Create(kRowPage, kRowPage, "small").value();
  EXPECT_EQ(VirtualKvCache::Create({{layout, small}}).error().code(), Code::kInvalidArgument);
  std::shared_ptr<SparseMemory> coarse =
      SparseMemory::Create(layout.bytes(), 2 * kRowPage, "coarse").value();
  EXPECT_THAT(VirtualKvCache::Create({{layout, coarse}}).error().message(), HasSubstr("131072"));
  EXPECT_FALSE(VirtualKvCache::Create({}).has_value());
  std::shared_ptr<SparseMemory> right =
      SparseMemory::Create(layout.bytes(), kRowPage, "ok").value();
  auto cache = VirtualKvCache::Create({{layout, right}}).value();
  EXPECT_THAT(cache->ReservePhysicalPages(kRowPage - 1).message(), HasSubstr("holds no page"));
}

// What the cache must answer, by counting promises.
struct RowsOracle {
  explicit RowsOracle(const VirtualScene& scene)
      : layout(scene.cache->layout()), rows(layout.rows) {}

  struct Row {
    bool live = false;
    uint32_t tokens = 0;
    uint32_t promised = 0;
    uint64_t stamp = 0;
  };
  uint64_t free() const {
    uint64_t pages = pool;
    for (const Row& row : rows) pages -= layout.PagesFor(row.promised);
    return pages;
  }
  bool RowLeft() const {
    return std::ranges::any_of(rows, [](const Row& row) { return !row.live; });
  }

  const VirtualLayout& layout;
  uint64_t pool = 0;
  std::vector<Row> rows;
};

class RandomRows {
 public:
  explicit RandomRows(testing_support::Random& random, int number)
      : random_(random),
        scene_(MakeVirtual({RowsOf(Pick(random, 2, 6), Pick(random, 1, 1024), number % 2 == 0)},
                           PoolOf(number), "virtual-random")),
        oracle_(scene_) {
    oracle_.pool = std::min<uint64_t>(pages_, oracle_.layout.rows * oracle_.layout.row_pages());
  }

  void Act() {
    switch (Pick(random_, 0, 5)) {
      case 0:
      case 1:
        return Alloc();
      case 2:
        return Free();
      case 3:
        return Shrink();
      default:
        return Step();
    }
  }

  void Check() const {
    uint64_t needed = 0;
    for (uint32_t row = 0; row < oracle_.rows.size(); ++row) {
      const RowsOracle::Row& expected = oracle_.rows[row];
      needed += oracle_.layout.PagesFor(expected.tokens);
      for (uint32_t range = 0; range < oracle_.layout.ranges; ++range) {
        for (uint32_t token = 0; token < expected.tokens; ++token) {
          uint64_t stamp = 0;
          std::memcpy(&stamp, scene_.At(row, token, range), sizeof(stamp));
          ASSERT_EQ(stamp, expected.stamp + token) << "row " << row << " token " << token;
        }
      }
    }
    scene_.cache->WaitForBackground();
    const uint64_t page = kRowPage * oracle_.layout.ranges;
    EXPECT_GE(scene_.resident(), needed * page);
    EXPECT_LE(scene_.resident(), oracle_.pool * page);
    EXPECT_EQ(ResidentOf("virtual-random").bytes, scene_.resident());
    const bool row_left = oracle_.RowLeft();
    EXPECT_EQ(scene_.cache->FreeTokens(), row_left ? oracle_.free() * 64 : 0);
  }

 private:
  uint64_t PoolOf(int number) {
    pages_ = Pick(random_, 1, 40);
    return pages_ * kRowPage * (number % 2 == 0 ? 1 : 4);
  }

  // Writes a sequence's tokens from `first` on.
  void Write(uint32_t row, uint32_t first) {
    const RowsOracle::Row& now = oracle_.rows[row];
    for (uint32_t range = 0; range < oracle_.layout.ranges; ++range) {
      for (uint32_t token = first; token < now.tokens; ++token) {
        const uint64_t stamp = now.stamp + token;
        std::memcpy(scene_.At(row, token, range), &stamp, sizeof(stamp));
      }
    }
  }

  void Alloc() {
    const uint32_t most = oracle_.layout.max_seq_len;
    const uint32_t tokens = Pick(random_, 0, most);
    const uint32_t promised = Pick(random_, 0, 1) == 0 ? tokens : Pick(random_, tokens, most);
    const auto row = scene_.cache->AllocNewBatchIdx(tokens, promised);
    const bool fits = oracle_.layout.PagesFor(promised) <= oracle_.free() && oracle_.RowLeft();
    ASSERT_EQ(row.has_value(), fits) << tokens << " tokens, promised " << promised;
    if (!fits) return;
    ASSERT_FALSE(oracle_.rows.at(*row).live);
    oracle_.rows[*row] = {
        .live = true, .tokens = tokens, .promised = promised, .stamp = ++stamps_ << 32};
    Write(*row, 0);
  }

  void Free() {
    const uint32_t row = Pick(random_, 0, static_cast<uint32_t>(oracle_.rows.size() - 1));
    EXPECT_EQ(scene_.cache->FreeBatchIdx(row).ok(), oracle_.rows[row].live);
    oracle_.rows[row] = {};
  }

  void Shrink() {
    const uint32_t row = Pick(random_, 0, static_cast<uint32_t>(oracle_.rows.size() - 1));
    RowsOracle::Row& now = oracle_.rows[row];
    const uint32_t to = Pick(random_, 0, now.promised);
    scene_.cache->Shrink(row, to);
    now.promised = to;
    now.tokens = std::min(now.tokens, to);
  }

  void Step() {
    std::vector<uint32_t> lens(oracle_.rows.size());
    uint64_t more = 0;
    for (uint32_t row = 0; row < lens.size(); ++row) {
      const RowsOracle::Row& now = oracle_.rows[row];
      if (!now.live || Pick(random_, 0, 3) == 0) continue;
      lens[row] = std::min(oracle_.layout.max_seq_len, now.tokens + Pick(random_, 1, 200));
      more += oracle_.layout.PagesFor(std::max(lens[row], now.promised)) -
              oracle_.layout.PagesFor(now.promised);
    }
    const bool async = Pick(random_, 0, 1) == 0;
    const Status status = async ? scene_.cache->StepAsync(lens) : scene_.cache->Step(lens);
    ASSERT_EQ(status.ok(), more <= oracle_.free()) << status.ToString();
    if (!status.ok()) return;
    for (uint32_t row = 0; row < lens.size(); ++row) {
      if (lens[row] == 0) continue;
      RowsOracle::Row& now = oracle_.rows[row];
      const uint32_t first = now.tokens;
      now.tokens = lens[row];
      now.promised = std::max(now.promised, lens[row]);
      Write(row, first);
    }
  }

  testing_support::Random& random_;
  uint64_t pages_ = 0;
  VirtualScene scene_;
  RowsOracle oracle_;
  uint64_t stamps_ = 0;
};

TEST(VirtualKvCache, KeepsEverySequencesTokensWhateverHappens) {
  testing_support::Random random(testing_support::TestSeed());
  for (int number = 0; number < 20 / tests::Slowness(); ++number) {
    RandomRows rows(random, number);
    for (int i = 0; i < 60 && !::testing::Test::HasFatalFailure(); ++i) {
      rows.Act();
      if (i % 10 == 9) rows.Check();
    }
  }
}

// Sequences come and go on threads of their own, on a pool that is always too small, while the
// background thread maps ahead for all of them.
TEST(VirtualKvCache, ManyThreadsShareThePool) {
  const VirtualScene scene = SmallCache(12, "virtual-13", 6);
  std::vector<std::thread> threads;
  std::atomic<uint32_t> served = 0;
  for (uint32_t number = 0; number < 3; ++number) {
    threads.emplace_back([&scene, &served, number] {
      testing_support::Random random(number);
      for (int i = 0; i < 60; ++i) {
        const auto row = scene.cache->AllocNewBatchIdx(Pick(random, 0, 200), 300);
        if (!row) continue;
        std::vector<uint32_t> lens(6);
        for (uint32_t tokens = 200; tokens <= 300; tokens += 20) {
          lens[*row] = tokens;
          ASSERT_TRUE(scene.cache->StepAsync(lens).ok());
          std::memset(scene.At(*row, 0), static_cast<int>(number), tokens * size_t{1024});
        }
        for (uint32_t token = 0; token < 300; ++token) {
          ASSERT_EQ(*scene.At(*row, token), std::byte(number));
        }
        ++served;
        ASSERT_TRUE(scene.cache->FreeBatchIdx(*row).ok());
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  EXPECT_GT(served, 0U);
  scene.cache->WaitForBackground();
  EXPECT_LE(scene.resident(), 12 * kRowPage);
  EXPECT_EQ(scene.cache->FreeTokens(), 12U * 64);
}

}  // namespace
}  // namespace kvrelay
