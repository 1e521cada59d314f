#include "kvcache/copy_plan.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <functional>

namespace kvrelay {
namespace {

using ::testing::HasSubstr;

// 2 x 3 runs of 8 bytes from each of blocks 1 and 2; the last byte is exactly the regions' last.
CopyPlan Good() {
  CopyPlan plan;
  plan.src_block_stride = 100;
  plan.dst_block_stride = 1000;
  plan.pairs = {{0, 0}, {1, 2}, {2, 1}};
  CopyBox box;
  box.src_offset = -100;
  box.dst_offset = 16;
  box.outer = {2, 40, 400};
  box.inner = {3, 10, 16};
  box.run_bytes = 8;
  box.first_pair = 1;
  box.num_pairs = 2;
  plan.boxes = {box};
  return plan;
}
const std::vector<uint64_t> kSrc = {100 + 40 + 20 + 8};
const std::vector<uint64_t> kDst = {16 + 2000 + 400 + 32 + 8};

TEST(CopyPlan, CountsBytesAndSlices) {
  EXPECT_EQ(Good().bytes(), 2 * 2 * 3 * 8U);
  EXPECT_EQ(Good().slices(), 2 * 2 * 3U);
  EXPECT_EQ(CopyPlan().bytes(), 0U);
}

TEST(CopyPlan, ThatEndsWithItsRegionsIsValid) {
  EXPECT_TRUE(Good().Validate(kSrc, kDst).ok());
  EXPECT_TRUE(CopyPlan().Validate({}, {}).ok());
  EXPECT_THAT(Good().Validate(std::vector<uint64_t>{kSrc[0] - 1}, kDst).message(),
              HasSubstr("leaves source region 0 of 167 bytes"));
  EXPECT_THAT(Good().Validate(kSrc, std::vector<uint64_t>{kDst[0] - 1}).message(),
              HasSubstr("leaves destination region 0"));
}

TEST(CopyPlan, StridesMayGoBackwardsInsideTheRegion) {
  CopyPlan plan = Good();
  plan.boxes[0].src_offset += 40 + 20;
  plan.boxes[0].outer.src_stride = -40;
  plan.boxes[0].inner.src_stride = -10;
  EXPECT_TRUE(plan.Validate(kSrc, kDst).ok());
  plan.boxes[0].inner.src_stride = -11;
  EXPECT_FALSE(plan.Validate(kSrc, kDst).ok());
}

struct Hostile {
  const char* name;
  std::function<void(CopyPlan&)> spoil;
};

class HostilePlan : public ::testing::TestWithParam<Hostile> {};

TEST_P(HostilePlan, IsRefused) {
  CopyPlan plan = Good();
  GetParam().spoil(plan);
  EXPECT_EQ(plan.Validate(kSrc, kDst).code(), Code::kInvalidArgument);
}

const Hostile kHostile[] = {
    {"NoSuchSource", [](CopyPlan& p) { p.boxes[0].src_region = 1; }},
    {"NoSuchDestination", [](CopyPlan& p) { p.boxes[0].dst_region = UINT32_MAX; }},
    {"BeforeTheSource", [](CopyPlan& p) { p.boxes[0].src_offset = -101; }},
    {"BeforeTheDestination", [](CopyPlan& p) { p.boxes[0].dst_offset = -1001; }},
    {"LeastOffset", [](CopyPlan& p) { p.boxes[0].src_offset = INT64_MIN; }},
    {"MostOffset", [](CopyPlan& p) { p.boxes[0].src_offset = INT64_MAX; }},
    {"BlockFarAway", [](CopyPlan& p) { p.pairs[2].src = UINT32_MAX; }},
    {"BlockStrideWraps", [](CopyPlan& p) { p.src_block_stride = UINT64_MAX; }},
    {"BlockStrideWrapsToZero", [](CopyPlan& p) { p.dst_block_stride = uint64_t{1} << 63; }},
    {"OuterCount", [](CopyPlan& p) { p.boxes[0].outer.count = UINT32_MAX; }},
    {"InnerStrideWraps", [](CopyPlan& p) { p.boxes[0].inner.src_stride = INT64_MAX; }},
    {"OuterStrideWraps", [](CopyPlan& p) { p.boxes[0].outer.dst_stride = INT64_MIN; }},
    {"LongRun", [](CopyPlan& p) { p.boxes[0].run_bytes = UINT64_MAX; }},
    {"EmptyRun", [](CopyPlan& p) { p.boxes[0].run_bytes = 0; }},
    {"NoOuter", [](CopyPlan& p) { p.boxes[0].outer.count = 0; }},
    {"NoInner", [](CopyPlan& p) { p.boxes[0].inner.count = 0; }},
    {"NoPairs", [](CopyPlan& p) { p.boxes[0].num_pairs = 0; }},
    {"PairsBehind", [](CopyPlan& p) { p.boxes[0].first_pair = 2; }},
    {"PairsWrap", [](CopyPlan& p) { p.boxes[0].first_pair = UINT32_MAX; }},
    {"ManyPairs", [](CopyPlan& p) { p.boxes[0].num_pairs = UINT32_MAX; }},
    {"SecondBoxOtherPairs",
     [](CopyPlan& p) {
       p.boxes.push_back(p.boxes[0]);
       p.boxes[1].first_pair = 0;
     }},
};

INSTANTIATE_TEST_SUITE_P(All, HostilePlan, ::testing::ValuesIn(kHostile),
                         [](const auto& info) { return info.param.name; });

}  // namespace
}  // namespace kvrelay
