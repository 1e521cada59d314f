// The cases that people name, each against the oracle of the randomised test, bytes and all.
#include <gtest/gtest.h>

#include "tests/kvcache/plan_case.h"

namespace kvrelay {
namespace {

using testing_support::CheckPlanCase;
using testing_support::PlanCase;

struct Named {
  const char* name;
  const char* line;  // over kCommon
};

// 3 layers of 4 heads x 24, blocks of 8, tokens 5 to 38, bf16, NHD to NHD, no scales.
constexpr const char* kCommon =
    "layers=3 reader_layers=3 kinds=16 heads=4 window=20 owner_tp=1 reader_tp=1 dim=8 "
    "owner_block=8 "
    "reader_block=10 other_block=10 begin=5 tokens=33 owner_type=6 reader_type=6 owner_scales=3 "
    "reader_scales=3 chunk=2 content=1 ";

const Named kNamed[] = {
    {"Same", ""},
    {"Tp4ToTp1", "owner_tp=4"},
    {"Tp1ToTp4", "reader_tp=4 reader_rank=2"},
    {"Tp2ToTp3WhichDoNotDivide", "heads=6 owner_tp=2 reader_tp=3 reader_rank=1"},
    {"Tp3Of4Heads", "owner_tp=3 reader_tp=2 reader_rank=1"},
    {"Tp16Of2HeadsIsReplicated", "heads=2 owner_tp=16 reader_tp=8 reader_rank=5"},
    {"Mla", "mla=1 owner_tp=8 reader_tp=2 reader_rank=1"},
    {"MlaBlocks", "mla=1 owner_block=3 reader_block=7"},
    {"PipelineOwner", "owner_cuts=1"},
    {"PipelineReader", "reader_begin=1 reader_layers=1"},
    {"PipelineBothUneven", "layers=4 owner_cuts=5 reader_begin=1 reader_layers=3"},
    {"Blocks2To8", "owner_block=2 reader_block=8"},
    {"Blocks8To2", "owner_block=8 reader_block=2"},
    {"Blocks6To9WhichDoNotDivide", "owner_block=6 reader_block=9"},
    {"BlocksOfOneToken", "owner_block=1 reader_block=5"},
    {"NhdToHnd", "reader_layout=1"},
    {"HndToNhd", "owner_layout=1"},
    {"HndToHndFewerHeads", "owner_layout=1 reader_layout=1 reader_tp=2 reader_rank=1"},
    {"KAndVSideBySide", "owner_layout=2 reader_layout=2"},
    {"KAndVSideBySideToNhd", "owner_layout=2 owner_block=4 reader_block=6"},
    {"OpaquePages", "opaque=1 owner_tp=2 begin=8"},
    {"OpaquePagesOfKAndV", "opaque=2 owner_layout=1 reader_layout=1 begin=16 tokens=20"},
    {"SlidingWindow", "kinds=6 window=10 owner_window=7 other_heads=6"},
    {"SlidingWindowOnBothSides", "kinds=5 window=10 owner_window=2 other_heads=6 reader_block=3"},
    {"WindowLayersOfOtherBlocks", "kinds=5 window=15 owner_window=0 other_block=3 other_heads=6"},
    {"TwoHeadCounts", "kinds=2 other_heads=2 owner_tp=2 reader_tp=4 reader_rank=3"},
    {"Bf16ToFp8", "reader_type=3"},
    {"Bf16ToFp8WithScales", "reader_type=3 reader_scales=0"},
    {"Fp8ToBf16WithScales", "owner_type=3 owner_scales=0 reader_type=2"},
    {"Fp8ToFp8OtherScalesPerHead", "owner_type=3 reader_type=3 owner_scales=1 reader_scales=1"},
    {"Fp32ToInt8PerHeadHndToNhd", "owner_type=0 reader_type=5 reader_scales=1 owner_layout=1"},
    {"Int8ScalesOfTheRequest", "owner_type=5 reader_type=1 owner_scales=2"},
    {"Fp16ToE5m2", "owner_type=1 reader_type=4 owner_block=2 reader_block=9"},
    {"OneToken", "tokens=1"},
    {"LongTablesInFront", "begin=29 owner_first=3 reader_first=2"},
};

class NamedPlan : public ::testing::TestWithParam<Named> {};

TEST_P(NamedPlan, MovesExactlyTheElementsOfTheReader) {
  const std::string line = std::string(kCommon) + GetParam().line;
  EXPECT_EQ(CheckPlanCase(PlanCase::Parse(line)), "") << line;
}

INSTANTIATE_TEST_SUITE_P(All, NamedPlan, ::testing::ValuesIn(kNamed),
                         [](const auto& info) { return info.param.name; });

}  // namespace
}  // namespace kvrelay
