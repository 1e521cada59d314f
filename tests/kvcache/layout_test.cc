#include "kvcache/layout.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cmath>
#include <functional>

namespace kvrelay {
namespace {

using ::testing::AllOf;
using ::testing::HasSubstr;

KvLayout Small() { return KvLayout::Dense(KvFormat::kNhd, DType::kBf16, 3, 4, 32, 16, 10); }

TEST(KvLayout, NamesAndSizesGoBothWays) {
  for (const auto& [dtype, size] : std::vector<std::pair<DType, uint32_t>>{{DType::kFp32, 4},
                                                                           {DType::kFp16, 2},
                                                                           {DType::kBf16, 2},
                                                                           {DType::kFp8E4m3, 1},
                                                                           {DType::kFp8E5m2, 1},
                                                                           {DType::kInt8, 1}}) {
    EXPECT_EQ(DTypeFromName(DTypeName(dtype)).value(), dtype);
    EXPECT_EQ(SizeOf(dtype), size);
  }
  for (const KvFormat format :
       {KvFormat::kNhd, KvFormat::kHnd, KvFormat::kMla, KvFormat::kOpaque}) {
    EXPECT_EQ(KvFormatFromName(KvFormatName(format)).value(), format);
  }
  EXPECT_THAT(DTypeFromName("fp8").error().message(), AllOf(HasSubstr("fp8"), HasSubstr("bf16")));
  EXPECT_THAT(KvFormatFromName("NHD").error().message(), HasSubstr("nhd, hnd, mla"));
}

TEST(KvLayout, DenseNhdPutsHeadsOfOneTokenTogether) {
  const KvLayout layout = Small();
  EXPECT_EQ(layout.head_stride, 64U);
  EXPECT_EQ(layout.token_stride, 4 * 64U);
  EXPECT_EQ(layout.block_stride, 16 * 4 * 64U);
  EXPECT_EQ(layout.k[0].offset, 0U);
  EXPECT_EQ(layout.v[0].offset, 10 * layout.block_stride);
  EXPECT_EQ(layout.k[1].offset, 20 * layout.block_stride);
  EXPECT_EQ(layout.dense_bytes(), 60 * layout.block_stride);
  EXPECT_EQ(layout.token_bytes(), 2 * 3 * 4 * 64U);
  EXPECT_EQ(layout.ToString(), "bf16 nhd 3 layers x 4 heads x 32, blocks of 16 x 10");
}

TEST(KvLayout, DenseHndPutsTokensOfOneHeadTogether) {
  const KvLayout layout = KvLayout::Dense(KvFormat::kHnd, DType::kFp32, 1, 4, 32, 16, 10);
  EXPECT_EQ(layout.token_stride, 128U);
  EXPECT_EQ(layout.head_stride, 16 * 128U);
  EXPECT_EQ(layout.block_stride, 4 * 16 * 128U);
}

TEST(KvLayout, DenseMlaHasNoV) {
  const KvLayout layout = KvLayout::Dense(KvFormat::kMla, DType::kBf16, 2, 1, 576, 16, 10);
  EXPECT_FALSE(layout.has_v());
  EXPECT_EQ(layout.dense_bytes(), 2 * 10 * 16 * 576 * 2U);
  EXPECT_TRUE(layout.Validate(std::vector<uint64_t>{layout.dense_bytes()}).ok());
}

TEST(KvLayout, ValidFitsExactlyAndNotOneByteLess) {
  for (const KvFormat format : {KvFormat::kNhd, KvFormat::kHnd}) {
    const KvLayout layout = KvLayout::Dense(format, DType::kFp16, 3, 4, 32, 16, 10);
    EXPECT_TRUE(layout.Validate(std::vector<uint64_t>{layout.dense_bytes()}).ok());
    const Status status = layout.Validate(std::vector<uint64_t>{layout.dense_bytes() - 1});
    EXPECT_EQ(status.code(), Code::kInvalidArgument);
    EXPECT_THAT(status.message(), AllOf(HasSubstr("V of layer 2"), HasSubstr("region 0")));
  }
}

TEST(KvLayout, SizesThatOverflowSaturateSoThatNothingFits) {
  const KvLayout layout =
      KvLayout::Dense(KvFormat::kNhd, DType::kFp32, 2, 65536, 1U << 20, 65536, 1U << 31);
  EXPECT_EQ(layout.dense_bytes(), UINT64_MAX);
  EXPECT_FALSE(layout.Validate(std::vector<uint64_t>{UINT64_MAX}).ok());
}

struct SpoiltLayout {
  const char* name;
  std::function<void(KvLayout&)> spoil;
  const char* message;
};

class HostileLayout : public ::testing::TestWithParam<SpoiltLayout> {};

TEST_P(HostileLayout, IsRefusedByName) {
  KvLayout layout = Small();
  const std::vector<uint64_t> regions = {layout.dense_bytes()};
  ASSERT_TRUE(layout.Validate(regions).ok());
  GetParam().spoil(layout);
  const Status status = layout.Validate(regions);
  EXPECT_EQ(status.code(), Code::kInvalidArgument);
  EXPECT_THAT(status.message(), HasSubstr(GetParam().message));
}

const SpoiltLayout kHostileLayouts[] = {
    {"UnknownDtype", [](KvLayout& l) { l.dtype = static_cast<DType>(77); }, "dtype 77"},
    {"UnknownFormat", [](KvLayout& l) { l.format = static_cast<KvFormat>(9); }, "format 9"},
    {"NoLayers", [](KvLayout& l) { l.k.clear(), l.v.clear(); }, "layers is 0"},
    {"TooManyLayers", [](KvLayout& l) { l.k.resize(5000), l.v.resize(5000); }, "5000"},
    {"NoV", [](KvLayout& l) { l.v.clear(); }, "3 K layers, 0 V layers"},
    {"FewerV", [](KvLayout& l) { l.v.pop_back(); }, "3 K layers, 2 V layers"},
    {"MlaWithV", [](KvLayout& l) { l.format = KvFormat::kMla; }, "mla: no V"},
    {"MlaWithHeads", [](KvLayout& l) { l.format = KvFormat::kMla, l.v.clear(); }, "one head"},
    {"NoHeads", [](KvLayout& l) { l.kv_heads = 0; }, "heads is 0"},
    {"ManyHeads", [](KvLayout& l) { l.kv_heads = UINT32_MAX; }, "4294967295"},
    {"NoHeadDim", [](KvLayout& l) { l.head_dim = 0; }, "head dim is 0"},
    {"HugeHeadDim", [](KvLayout& l) { l.head_dim = UINT32_MAX; }, "head dim"},
    {"NoBlockSize", [](KvLayout& l) { l.block_size = 0; }, "block size is 0"},
    {"HugeBlockSize", [](KvLayout& l) { l.block_size = UINT32_MAX; }, "block size"},
    {"NoBlocks", [](KvLayout& l) { l.num_blocks = 0; }, "blocks is 0"},
    {"OneBlockMore", [](KvLayout& l) { l.num_blocks = 11; }, "region 0 has"},
    {"ManyBlocks", [](KvLayout& l) { l.num_blocks = UINT32_MAX; }, "number of blocks"},
    {"MostBlocks", [](KvLayout& l) { l.num_blocks = 1U << 31; }, "region 0 has"},
    {"NoRegion", [](KvLayout& l) { l.v[1].region = 1; }, "V of layer 1 is in region 1"},
    {"HugeRegion", [](KvLayout& l) { l.k[1].region = UINT32_MAX; }, "K of layer 1"},
    {"OffsetBehind", [](KvLayout& l) { l.k[2].offset = l.dense_bytes() + 64; }, "K of layer 2"},
    {"OffsetWraps", [](KvLayout& l) { l.k[0].offset = UINT64_MAX - 63; }, "K of layer 0"},
    {"OffsetOdd", [](KvLayout& l) { l.k[0].offset = 1; }, "element size 2"},
    {"BlockStrideWraps", [](KvLayout& l) { l.block_stride = UINT64_MAX / 8; }, "block stride"},
    {"BlockStrideLarge", [](KvLayout& l) { l.block_stride = 1ULL << 48; }, "region 0 has"},
    {"BlockStrideZero", [](KvLayout& l) { l.block_stride = 0; }, "block stride 0"},
    {"BlocksOverlap", [](KvLayout& l) { l.block_stride -= 2; }, "overlap"},
    {"HeadStrideZero", [](KvLayout& l) { l.head_stride = 0; }, "head stride 0"},
    {"HeadsOverlap", [](KvLayout& l) { l.head_stride = 62; }, "head stride 62"},
    {"TokensOverlap", [](KvLayout& l) { l.token_stride = 62; }, "token stride 62"},
    {"TokensInterleaveHeads", [](KvLayout& l) { l.token_stride = 128; }, "overlap"},
    {"StrideOdd", [](KvLayout& l) { l.token_stride = 257; }, "element size 2"},
};

INSTANTIATE_TEST_SUITE_P(All, HostileLayout, ::testing::ValuesIn(kHostileLayouts),
                         [](const auto& info) { return info.param.name; });

// Two kinds of layers, opaque pages, scales: valid, then spoilt.
struct Rich {
  const char* name;
  std::function<void(KvLayout&)> spoil;
  const char* message;
};

class RichLayout : public ::testing::TestWithParam<Rich> {};

TEST_P(RichLayout, IsRefusedByName) {
  KvLayout layout = Small();
  layout.format = KvFormat::kOpaque;
  layout.page_name = "amx";
  layout.page_bytes = 1024;
  layout.head_stride = 1024;
  layout.more_kinds = {layout.kind(0)};
  layout.more_kinds[0].kv_heads = 2;
  layout.layer_kinds = {0, 1, 0};
  const std::vector<uint64_t> regions = {layout.dense_bytes()};
  ASSERT_TRUE(layout.Validate(regions).ok()) << layout.Validate(regions).ToString();
  layout.scales = {true, std::vector<float>(10, 2.0F), std::vector<float>(10, 0.5F)};
  ASSERT_TRUE(layout.Validate(regions).ok()) << layout.Validate(regions).ToString();
  GetParam().spoil(layout);
  const Status status = layout.Validate(regions);
  EXPECT_EQ(status.code(), Code::kInvalidArgument);
  EXPECT_THAT(status.message(), HasSubstr(GetParam().message));
}

const Rich kRich[] = {
    {"KindUnknown", [](KvLayout& l) { l.layer_kinds[2] = 2; }, "layer 2 is of kind 2 of 2"},
    {"KindsShort", [](KvLayout& l) { l.layer_kinds.pop_back(); }, "2 layers' kinds"},
    {"KindsMany", [](KvLayout& l) { l.more_kinds.resize(64, l.kind(0)); }, "number of kinds"},
    {"OtherKindNoBlocks", [](KvLayout& l) { l.more_kinds[0].num_blocks = 0; }, "blocks is 0"},
    {"OtherKindBlocks", [](KvLayout& l) { l.more_kinds[0].num_blocks = 900; }, "K of layer 1"},
    {"NoPageBytes", [](KvLayout& l) { l.page_bytes = 0; }, "page bytes is 0"},
    {"PagesOverlap", [](KvLayout& l) { l.page_bytes = 1026; }, "overlap"},
    {"PageWraps", [](KvLayout& l) { l.page_bytes = UINT64_MAX; }, "page bytes"},
    {"NoPageName", [](KvLayout& l) { l.page_name.clear(); }, "named \"\""},
    {"PagesNotOpaque", [](KvLayout& l) { l.format = KvFormat::kHnd, l.page_name.clear(); },
     "not opaque"},
    {"ScalesShort", [](KvLayout& l) { l.scales.k.pop_back(); }, "9 scales of K, needed are 10"},
    {"ScalesOfVMissing", [](KvLayout& l) { l.scales.v.clear(); }, "0 scales of V"},
    {"ScalesPerTensor", [](KvLayout& l) { l.scales.per_head = false; }, "needed are 3"},
    {"ScaleZero", [](KvLayout& l) { l.scales.v[3] = 0; }, "a scale of V is 0"},
    {"ScaleNegative", [](KvLayout& l) { l.scales.k[0] = -1; }, "a scale of K is -1"},
    {"ScaleNan", [](KvLayout& l) { l.scales.k[0] = std::nanf(""); }, "a scale of K is nan"},
    {"ScaleInfinite", [](KvLayout& l) { l.scales.k[0] = HUGE_VALF; }, "a scale of K is inf"},
    {"ScaleSubnormal", [](KvLayout& l) { l.scales.k[0] = 1e-40F; }, "no normal number"},
};

INSTANTIATE_TEST_SUITE_P(All, RichLayout, ::testing::ValuesIn(kRich),
                         [](const auto& info) { return info.param.name; });

TEST(KvLayout, NoRegionsAtAll) {
  EXPECT_THAT(Small().Validate({}).message(), HasSubstr("there are 0"));
}

TEST(KvLayout, KAndVSideBySideIsValid) {
  KvLayout layout = Small();
  layout.head_stride = 2 * 64;
  layout.token_stride = 4 * layout.head_stride;
  layout.block_stride = 16 * layout.token_stride;
  for (uint32_t i = 0; i < 3; ++i) {
    layout.k[i] = {i, 0};
    layout.v[i] = {i, 64};
  }
  const uint64_t bytes = 10 * layout.block_stride;
  EXPECT_TRUE(layout.Validate(std::vector<uint64_t>{bytes, bytes, bytes}).ok());
  EXPECT_FALSE(layout.Validate(std::vector<uint64_t>{bytes, bytes - 1, bytes}).ok());
}

}  // namespace
}  // namespace kvrelay
