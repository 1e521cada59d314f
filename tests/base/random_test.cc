#include "base/random.h"

#include <gtest/gtest.h>

#include <set>
#include <unordered_set>

namespace kvrelay {
namespace {

TEST(Random, ValuesDoNotRepeat) {
  std::set<uint64_t> values;
  std::unordered_set<LeaseId> ids;
  for (int i = 0; i < 1000; ++i) {
    values.insert(Random64());
    ids.insert(RandomId<LeaseId>());
  }
  EXPECT_EQ(values.size(), 1000U);
  EXPECT_EQ(ids.size(), 1000U);
}

TEST(Random, FirstEpochsAreWideAndLeaveRoomToCount) {
  uint64_t all = 0;
  for (int i = 0; i < 1000; ++i) {
    const uint64_t epoch = RandomFirstEpoch();
    ASSERT_NE(epoch, 0U);
    ASSERT_EQ(epoch >> 60, 0U);
    all |= epoch;
  }
  EXPECT_EQ(all, (uint64_t{1} << 60) - 1);  // every one of the 60 bits takes part
}

TEST(Random, IncarnationsAreNeverZero) {
  for (int i = 0; i < 1000; ++i) ASSERT_NE(RandomIncarnation(), 0U);
}

}  // namespace
}  // namespace kvrelay
