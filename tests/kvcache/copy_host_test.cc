#include "kvcache/copy_host.h"

#include <gtest/gtest.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cstring>
#include <numeric>
#include <span>

#include "base/mapping.h"
#include "base/parallel.h"
#include "tests/kvcache/seed.h"

namespace kvrelay {
namespace {

using testing_support::Random;
using testing_support::TestSeed;

std::vector<std::byte> RandomBytes(Random& random, size_t bytes) {
  std::vector<std::byte> data(bytes);
  for (size_t at = 0; at < bytes; at += sizeof(uint64_t)) {
    const uint64_t word = random();
    std::memcpy(data.data() + at, &word, std::min(sizeof(word), bytes - at));
  }
  return data;
}

// The definition in copy_plan.h, word for word.
void CopyByDefinition(const CopyPlan& plan, const std::byte* src, std::byte* dst) {
  ForEachRun(plan, [&](const CopyBox& box, const PlanRun& run) {
    std::memcpy(dst + run.dst, src + run.src, box.run_bytes);
  });
}

void ExpectCopies(const CopyPlan& plan, const std::vector<std::byte>& src, size_t dst_bytes) {
  const std::vector<uint64_t> src_bytes = {src.size()};
  const Status valid = plan.Validate(src_bytes, std::vector<uint64_t>{dst_bytes});
  ASSERT_TRUE(valid.ok()) << valid.ToString();
  const std::vector<std::byte> before(dst_bytes, std::byte{0x5a});
  std::vector<std::byte> want = before;
  CopyByDefinition(plan, src.data(), want.data());
  const std::byte* const from[] = {src.data()};
  for (const uint64_t whole_bytes : {0, 1 << 30}) {
    std::vector<std::byte> got = before;
    std::byte* const to[] = {got.data()};
    ExecuteCopy(plan, from, to, whole_bytes);
    if (std::memcmp(got.data(), want.data(), dst_bytes) == 0) continue;
    const auto difference = std::mismatch(got.begin(), got.end(), want.begin()).first;
    FAIL() << "first difference at byte " << difference - got.begin() << " as a part of "
           << whole_bytes << " bytes";
  }
}

CopyPlan OneRun(uint64_t run_bytes, uint64_t src_offset, uint64_t dst_offset) {
  CopyPlan plan;
  plan.boxes.resize(1);
  plan.boxes[0].run_bytes = run_bytes;
  plan.places = {{0, 0, src_offset, dst_offset}};
  plan.segments = {{0, 0}};
  return plan;
}

TEST(ExecuteCopy, EmptyPlanDoesNothing) { ExecuteCopy(CopyPlan(), {}, {}); }

TEST(ExecuteCopy, EveryLengthAtEveryAlignment) {
  Random random(1);
  const std::vector<std::byte> src = RandomBytes(random, 1024);
  for (uint64_t run = 1; run <= 300; ++run) {
    for (const uint64_t from : {0, 1, 63}) {
      for (const uint64_t to : {0, 1, 31, 32, 63}) {
        SCOPED_TRACE(testing::Message() << run << " bytes from " << from << " to " << to);
        ExpectCopies(OneRun(run, from, to), src, 512);
        if (HasFatalFailure()) return;
      }
    }
  }
}

TEST(ExecuteCopy, ReadsNoByteBehindItsSource) {
  const auto page = static_cast<size_t>(::sysconf(_SC_PAGESIZE));
  const Mapping pages =
      Mapping::Map(3 * page, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1).value();
  std::byte* const middle = pages.data() + page;
  ASSERT_EQ(::mprotect(pages.data(), page, PROT_NONE), 0);
  ASSERT_EQ(::mprotect(middle + page, page, PROT_NONE), 0);
  std::memset(middle, 3, page);
  std::vector<std::byte> copy(page);
  std::byte* const to[] = {copy.data()};
  for (uint64_t run = 1; run <= 700; ++run) {
    for (std::byte* const from : {middle, middle + page - run}) {
      const std::byte* const src[] = {from};
      ExecuteCopy(OneRun(run, 0, 0), src, to);
      ASSERT_EQ(copy[run - 1], std::byte{3});
    }
  }
}

// Copies large enough to be streamed and shared among threads.
class LargeCopy : public ::testing::Test {
 protected:
  void SetUp() override {
    parallelism_ = Parallelism();
    SetParallelism(4);
  }
  void TearDown() override { SetParallelism(parallelism_); }

 private:
  int parallelism_ = 0;
};

TEST_F(LargeCopy, OneLongRunIsShared) {
  Random random(2);
  const std::vector<std::byte> src = RandomBytes(random, (5 << 20) + 100);
  for (const uint64_t offset : {0, 7})
    ExpectCopies(OneRun((5 << 20) + 13, 0, offset), src, 6 << 20);
}

TEST_F(LargeCopy, BoxesOfAllSortsOfRuns) {
  const uint64_t seed = TestSeed();
  Random random(seed);
  constexpr uint64_t kPayload = 9 << 19;  // each case, in two tensors
  const std::vector<std::byte> src = RandomBytes(random, 3 * kPayload);
  for (const uint32_t run : {16, 40, 64, 128, 256, 384, 1000, 2049, 16384, 300000}) {
    for (const uint32_t gap : {0, 24}) {
      SCOPED_TRACE(testing::Message()
                   << "KVRELAY_SEED=" << seed << " run " << run << " gap " << gap);
      // Blocks of 2 x 3 runs in the source, 3 x 2 in the destination.
      const uint64_t step = run + gap;
      const uint64_t block = 6 * step;
      const auto blocks = static_cast<uint32_t>(kPayload / 2 / (6 * run) + 1);
      CopyPlan plan;
      std::vector<uint32_t> order(blocks);
      std::iota(order.begin(), order.end(), 0);
      std::shuffle(order.begin(), order.end(), random);
      for (uint32_t i = 0; i < blocks; ++i) plan.segments.push_back({i * block, order[i] * block});
      plan.places = {{}, {0, 0, blocks * block, blocks * block}};
      plan.boxes.resize(1);
      plan.boxes[0].num_places = 2;
      plan.boxes[0].inner = {3, 2 * step, step};
      plan.boxes[0].outer = {2, step, 3 * step};
      plan.boxes[0].run_bytes = run;
      plan.boxes[0].num_segments = blocks;
      ASSERT_LE(2 * blocks * block, src.size());
      ExpectCopies(plan, src, 2 * blocks * block);
      if (HasFatalFailure()) return;
    }
  }
}

// Shared among threads, and small enough not to be.
TEST_F(LargeCopy, OneRunToEachOfManySegments) {
  const uint64_t seed = TestSeed();
  Random random(seed);
  const std::vector<std::byte> src = RandomBytes(random, 6 << 20);
  for (const uint64_t run : {1, 40, 64, 256, 1000, 2048, 4096}) {
    for (const uint64_t gap : {0, 24, 64}) {
      for (const uint64_t blocks : {uint64_t{64}, uint64_t{65}, (2 << 20) / (run + gap)}) {
        SCOPED_TRACE(testing::Message() << "KVRELAY_SEED=" << seed << " run " << run << " gap "
                                        << gap << " blocks " << blocks);
        std::vector<uint64_t> order(blocks);
        std::iota(order.begin(), order.end(), 0);
        std::shuffle(order.begin(), order.end(), random);
        const uint64_t step = run + gap;
        CopyPlan plan = OneRun(run, 0, 0);
        plan.segments.clear();
        for (uint64_t i = 0; i < blocks; ++i) plan.segments.push_back({i * step, order[i] * step});
        plan.places = {{}, {0, 0, blocks * step, 2 * blocks * step}};
        plan.boxes[0].num_places = 2;
        plan.boxes[0].num_segments = static_cast<uint32_t>(blocks);
        ExpectCopies(plan, src, 3 * blocks * step);
        if (HasFatalFailure()) return;
      }
    }
  }
}

// Destinations that take turns, 128 KiB each, between two nodes of a machine that we make up.
TEST_F(LargeCopy, OnSeveralNodesOfMemoryAllIsCopiedAndTheDestinationSaysWhere) {
  static std::atomic<size_t> asked;
  static const std::byte* into;
  const uint64_t seed = TestSeed();
  Random random(seed);
  SCOPED_TRACE(testing::Message() << "KVRELAY_SEED=" << seed);
  constexpr uint32_t kRun = 5000;
  constexpr uint32_t kRuns = 2000;
  const std::vector<std::byte> src = RandomBytes(random, uint64_t{kRun} * kRuns);
  std::vector<std::byte> got(src.size());
  CopyPlan plan = OneRun(kRun, 0, 0);
  std::vector<uint32_t> order(kRuns);
  std::iota(order.begin(), order.end(), 0);
  std::shuffle(order.begin(), order.end(), random);
  plan.segments.clear();
  for (uint32_t i = 0; i < kRuns; ++i) {
    plan.segments.push_back({uint64_t{i} * kRun, uint64_t{order[i]} * kRun});
  }
  plan.boxes[0].num_segments = kRuns;
  into = got.data();
  asked = 0;
  SetNumaTopology(
      {.nodes = {{.id = 0, .binding = -1, .threads = 2}, {.id = 1, .binding = -1, .threads = 2}},
       .locate = [](std::span<const void* const> pages, std::span<int> nodes) {
         for (size_t i = 0; i < pages.size(); ++i) {
           const ptrdiff_t at = static_cast<const std::byte*>(pages[i]) - into;
           EXPECT_GE(at, 0);
           EXPECT_LT(at, ptrdiff_t{kRun} * kRuns);
           nodes[i] = static_cast<int>((at >> 17) % 2);
         }
         asked += pages.size();
       }});
  const std::byte* const from[] = {src.data()};
  std::byte* const to[] = {got.data()};
  ExecuteCopy(plan, from, to);
  SetNumaTopology({});
  EXPECT_GE(asked, 2U);
  std::vector<std::byte> want(src.size());
  CopyByDefinition(plan, src.data(), want.data());
  EXPECT_TRUE(got == want);
}

}  // namespace
}  // namespace kvrelay
