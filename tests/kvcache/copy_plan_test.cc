#include "kvcache/copy_plan.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <functional>

namespace kvrelay {
namespace {

using ::testing::HasSubstr;

// 2 x 3 runs of 8 bytes from each of two segments at one place; the last byte is exactly the
// regions' last.
CopyPlan Good() {
  CopyPlan plan;
  plan.places = {{0, 0, 0, 1000}, {0, 0, 0, 16}};
  plan.segments = {{500, 5000}, {0, 2000}, {100, 1000}};
  CopyBox box;
  box.first_place = 1;
  box.outer = {2, 40, 400};
  box.inner = {3, 10, 16};
  box.run_bytes = 8;
  box.first_segment = 1;
  box.num_segments = 2;
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

// Runs of 4 bf16 from 4 fp32.
CopyPlan GoodCast() {
  CopyPlan plan = Good();
  plan.boxes[0].casts = true;
  plan.boxes[0].cast = {DType::kFp32, DType::kBf16, 1, 0, 3, 1};
  plan.factors = {1, 2, 3, 4, 5, 6, 7};
  return plan;
}

TEST(CopyPlan, CastsReadAsManyElementsAsTheyWrite) {
  EXPECT_EQ(GoodCast().bytes(), 2 * 2 * 3 * 8U);
  EXPECT_EQ(GoodCast().src_bytes(), 2 * 2 * 3 * 16U);
  const std::vector<uint64_t> src = {kSrc[0] + 8};
  EXPECT_TRUE(GoodCast().Validate(src, kDst).ok());
  EXPECT_FALSE(GoodCast().Validate(kSrc, kDst).ok());
  for (const auto& spoil : std::vector<std::function<void(CopyPlan&)>>{
           [](CopyPlan& p) { p.factors.pop_back(); },
           [](CopyPlan& p) { p.boxes[0].cast.first_factor = 2; },
           [](CopyPlan& p) { p.boxes[0].cast.outer_step = UINT32_MAX; },
           [](CopyPlan& p) { p.boxes[0].run_bytes = 7; },
           [](CopyPlan& p) { p.boxes[0].run_bytes = UINT64_MAX - 1; },
           [](CopyPlan& p) { p.boxes[0].cast.from = static_cast<DType>(9); },
           [](CopyPlan& p) { p.boxes[0].cast.to = static_cast<DType>(9); },
       }) {
    CopyPlan plan = GoodCast();
    spoil(plan);
    EXPECT_EQ(plan.Validate(src, kDst).code(), Code::kInvalidArgument);
  }
}

TEST(CopyPlan, RunsAreEnumeratedPlaceSegmentOuterInner) {
  std::vector<uint64_t> sources;
  std::vector<float> factors;
  CopyPlan plan = GoodCast();
  plan.boxes[0].first_place = 0, plan.boxes[0].num_places = 2;
  plan.boxes[0].inner.count = 1, plan.boxes[0].cast.place_step = 1;
  ForEachRun(plan, [&](const CopyBox&, const PlanRun& run) {
    sources.push_back(run.dst);
    factors.push_back(run.factor);
  });
  EXPECT_EQ(sources, (std::vector<uint64_t>{3000, 3400, 2000, 2400, 2016, 2416, 1016, 1416}));
  EXPECT_EQ(factors, (std::vector<float>{2, 5, 2, 5, 3, 6, 3, 6}));
}

struct SpoiltPlan {
  const char* name;
  std::function<void(CopyPlan&)> spoil;
};

class HostilePlan : public ::testing::TestWithParam<SpoiltPlan> {};

TEST_P(HostilePlan, IsRefused) {
  CopyPlan plan = Good();
  GetParam().spoil(plan);
  EXPECT_EQ(plan.Validate(kSrc, kDst).code(), Code::kInvalidArgument);
}

const SpoiltPlan kHostilePlans[] = {
    {"NoSuchSource", [](CopyPlan& p) { p.places[1].src_region = 1; }},
    {"NoSuchDestination", [](CopyPlan& p) { p.places[1].dst_region = UINT32_MAX; }},
    {"MostOffset", [](CopyPlan& p) { p.places[1].src_offset = UINT64_MAX; }},
    {"OffsetWraps", [](CopyPlan& p) { p.places[1].dst_offset = UINT64_MAX - 1999; }},
    {"SegmentFarAway", [](CopyPlan& p) { p.segments[2].src = UINT64_MAX; }},
    {"SegmentWraps", [](CopyPlan& p) { p.segments[1].dst = UINT64_MAX - 100; }},
    {"OuterCount", [](CopyPlan& p) { p.boxes[0].outer.count = UINT32_MAX; }},
    {"InnerStrideWraps", [](CopyPlan& p) { p.boxes[0].inner.src_stride = UINT64_MAX; }},
    {"OuterStrideWraps", [](CopyPlan& p) { p.boxes[0].outer.dst_stride = uint64_t{1} << 63; }},
    {"LongRun", [](CopyPlan& p) { p.boxes[0].run_bytes = UINT64_MAX; }},
    {"EmptyRun", [](CopyPlan& p) { p.boxes[0].run_bytes = 0; }},
    {"NoOuter", [](CopyPlan& p) { p.boxes[0].outer.count = 0; }},
    {"NoInner", [](CopyPlan& p) { p.boxes[0].inner.count = 0; }},
    {"NoSegments", [](CopyPlan& p) { p.boxes[0].num_segments = 0; }},
    {"SegmentsBehind", [](CopyPlan& p) { p.boxes[0].first_segment = 2; }},
    {"SegmentsWrap", [](CopyPlan& p) { p.boxes[0].first_segment = UINT32_MAX; }},
    {"ManySegments", [](CopyPlan& p) { p.boxes[0].num_segments = UINT32_MAX; }},
    {"NoPlaces", [](CopyPlan& p) { p.boxes[0].num_places = 0; }},
    {"PlacesBehind", [](CopyPlan& p) { p.boxes[0].first_place = 2; }},
    {"ManyPlaces", [](CopyPlan& p) { p.boxes[0].num_places = UINT32_MAX; }},
    {"SecondBoxOtherSegments",
     [](CopyPlan& p) {
       p.boxes.push_back(p.boxes[0]);
       p.boxes[1].first_segment = 0;
     }},
    {"SecondBoxOtherPlaces",
     [](CopyPlan& p) {
       p.boxes.push_back(p.boxes[0]);
       p.boxes[1].first_place = 0;
     }},
};

INSTANTIATE_TEST_SUITE_P(All, HostilePlan, ::testing::ValuesIn(kHostilePlans),
                         [](const auto& info) { return info.param.name; });

}  // namespace
}  // namespace kvrelay
