// Block ids as runs: what comes back is what went in, and it is small.
#include "proto/block_runs.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <numeric>

#include "tests/proto/random_message.h"

namespace kvrelay::proto {
namespace {

using Blocks = std::vector<BlockId>;

std::string WhyNoBlocks(std::string_view bytes, size_t max = 100) {
  const auto blocks = UnpackBlocks(bytes, max);
  return blocks.has_value() ? std::to_string(blocks->size()) + " blocks" : blocks.error().message();
}

TEST(BlockRuns, ComeBackAsTheyWere) {
  const uint64_t seed = TestSeed();
  SCOPED_TRACE("KVRELAY_SEED=" + std::to_string(seed));
  Random random(seed);
  for (const Blocks& blocks :
       {Blocks{}, Blocks{0}, Blocks{UINT32_MAX}, Blocks{UINT32_MAX, 0, 1, 0}, Blocks{7, 6, 5},
        Blocks{3, 3, 3}, Blocks{UINT32_MAX - 1, UINT32_MAX}}) {
    EXPECT_EQ(UnpackBlocks(PackBlocks(blocks), blocks.size()).value(), blocks);
  }
  for (int i = 0; i < 2000; ++i) {
    Blocks blocks;
    while (random() % 8 != 0) {
      const auto first = static_cast<BlockId>(random() >> (random() % 64));
      for (uint64_t count = random() % 20; count > 0; --count) {
        blocks.push_back(static_cast<BlockId>(first + count % 7 + count));
      }
    }
    ASSERT_EQ(UnpackBlocks(PackBlocks(blocks), blocks.size()).value(), blocks);
  }
}

TEST(BlockRuns, ARunIsAFewBytesWhateverItsLength) {
  Blocks run(100'000);
  std::iota(run.begin(), run.end(), 2000U);
  EXPECT_EQ(PackBlocks(run).size(), 2U + 3U);
  EXPECT_EQ(PackBlocks(Blocks{1, 9, 4}).size(), 3U) << "neighbours cost a byte";
  Blocks scattered(750);
  Random random(7);
  for (BlockId& block : scattered) block = static_cast<BlockId>(random() % (1U << 20));
  EXPECT_LE(PackBlocks(scattered).size(), 4U * 750) << "of a million blocks";
}

TEST(BlockRuns, WhatIsNoTableIsRefusedWithoutTakingMemory) {
  EXPECT_EQ(WhyNoBlocks("\x80"), "has a run of blocks cut short");
  EXPECT_EQ(WhyNoBlocks("\x01"), "has a run of blocks cut short") << "its count is missing";
  EXPECT_EQ(WhyNoBlocks("\xff\xff\xff\xff\xff\xff\x01"), "has a run of blocks cut short")
      << "too long";
  EXPECT_EQ(WhyNoBlocks(std::string_view("\x02", 1)), "has a block id outside 32 bits") << "-1";
  EXPECT_EQ(WhyNoBlocks("\xfc\xff\xff\xff\x3f\x05\x05"), "has a block id outside 32 bits");
  EXPECT_EQ(WhyNoBlocks(std::string_view("\x01\x62", 2)), "100 blocks");
  EXPECT_EQ(WhyNoBlocks(std::string_view("\x01\x63", 2)), "has more than 100 blocks");
  EXPECT_EQ(WhyNoBlocks(std::string_view("\x01\xff\xff\xff\xff\x7f", 6)),
            "has more than 100 blocks");
}

}  // namespace
}  // namespace kvrelay::proto
