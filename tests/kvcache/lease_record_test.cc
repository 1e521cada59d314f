#include "kvcache/lease_record.h"

#include <gtest/gtest.h>

#include <functional>

namespace kvrelay {
namespace {

TEST(Progress, GoesThroughAWordUnchanged) {
  for (const Progress p : {Progress{}, Progress{1, 2, 3}, Progress{0, 512, 255},
                           Progress{(1U << 28) - 1, (1U << 28) - 1, 255}}) {
    EXPECT_EQ(Progress::Unpack(p.Pack()), p);
  }
}

TEST(Progress, IsMonotonicAsANumber) {
  const Progress steps[] = {{0, 0, 0},      {0, 512, 0},    {0, 512, 1},    {0, 512, 31},
                            {512, 512, 31}, {512, 1024, 0}, {512, 1024, 1}, {1000, 1000, 0}};
  for (size_t i = 1; i < std::size(steps); ++i) {
    EXPECT_LT(steps[i - 1].Pack(), steps[i].Pack()) << i;
  }
}

TEST(Progress, SaturatesInsteadOfWrapping) {
  const Progress most = Progress::Unpack(Progress{UINT32_MAX, 1U << 28, 256}.Pack());
  EXPECT_EQ(most, (Progress{(1U << 28) - 1, (1U << 28) - 1, 255}));
}

class GuardTest : public ::testing::Test {
 protected:
  static constexpr uint64_t kEpoch = 0x7fedcba987654321;
  const GuardExpectation want_{kEpoch, 11, 22, {100}};
  LeaseRecord record_;

  bool Holds(const GuardWords& before) const {
    return GuardHolds(want_, before, record_.ReadAfter());
  }
};

TEST_F(GuardTest, HoldsFromPublishToEnd) {
  EXPECT_FALSE(record_.live());
  EXPECT_FALSE(Holds(record_.ReadBefore()));

  record_.Start(kEpoch, 11, 22);
  EXPECT_TRUE(record_.live());
  EXPECT_FALSE(Holds(record_.ReadBefore())) << "nothing is computed yet";

  record_.Publish({99, 200, 3});
  EXPECT_FALSE(Holds(record_.ReadBefore()));
  record_.Publish({100, 200, 0});
  EXPECT_TRUE(Holds(record_.ReadBefore()));
  record_.Publish({200, 200, 0});
  const GuardWords before = record_.ReadBefore();
  EXPECT_TRUE(Holds(before));

  record_.End();
  EXPECT_FALSE(record_.live());
  EXPECT_FALSE(Holds(before)) << "the lease ended during the read";
  EXPECT_FALSE(Holds(record_.ReadBefore()));
  const GuardWords dead = record_.ReadBefore();
  record_.End();
  EXPECT_EQ(record_.ReadBefore(), dead) << "End is idempotent";
}

TEST_F(GuardTest, NextLeaseInTheSameSlotDoesNotHoldForTheOldOne) {
  record_.Start(kEpoch, 11, 22);
  record_.Publish({100, 100, 0});
  const GuardWords before = record_.ReadBefore();
  record_.End();
  record_.Start(kEpoch + 1, 11, 22);
  EXPECT_EQ(Progress::Unpack(record_.ReadBefore().w1).tokens, 0U);
  record_.Publish({100, 100, 0});
  EXPECT_FALSE(Holds(before));
  EXPECT_FALSE(Holds(record_.ReadBefore()));
}

TEST_F(GuardTest, ProgressOfTheSecondReadDoesNotCount) {
  record_.Start(kEpoch, 11, 22);
  record_.Publish({50, 100, 0});
  const GuardWords before = record_.ReadBefore();
  record_.Publish({100, 100, 0});
  EXPECT_FALSE(Holds(before)) << "the last tokens may have been read half written";
}

TEST_F(GuardTest, EachWordOfEachReadIsChecked) {
  record_.Start(kEpoch, 11, 22);
  record_.Publish({100, 100, 0});
  const GuardWords good = record_.ReadBefore();
  ASSERT_TRUE(GuardHolds(want_, good, good));
  const std::function<void(GuardWords&)> spoils[] = {
      [](GuardWords& w) { w.w0 ^= 1; },  // dead
      [](GuardWords& w) { w.w0 += 2; },  // another epoch
      [](GuardWords& w) { w.w0 ^= 1ULL << 63; }, [](GuardWords& w) { w.w2 += 1; },
      [](GuardWords& w) { w.w3 += 1; },
  };
  for (const auto& spoil : spoils) {
    GuardWords bad = good;
    spoil(bad);
    EXPECT_FALSE(GuardHolds(want_, bad, good)) << &spoil - spoils;
    EXPECT_FALSE(GuardHolds(want_, good, bad)) << &spoil - spoils;
  }
  GuardWords later = good;
  later.w1 = Progress{200, 200, 0}.Pack();
  EXPECT_TRUE(GuardHolds(want_, good, later)) << "progress during the read is no harm";
}

}  // namespace
}  // namespace kvrelay
