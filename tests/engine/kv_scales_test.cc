#include "engine/kv_scales.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <map>
#include <tuple>

#include "engine_testing.h"

namespace kvrelay::engine {
namespace {

constexpr const char* kModel = "models/bard-4m";  // 6 layers, 4 KV heads

std::unique_ptr<ModelRunner> RunnerWith(const EngineOptions& options) {
  const auto config = LoadModelConfig(options.model_dir);
  const auto checkpoint = Checkpoint::Open(options.model_dir);
  return ModelRunner::Create(*config, *checkpoint, options).value();
}

EngineOptions Int8Options() {
  EngineOptions options = SmallOptions(kModel);
  options.kv_dtype = DType::kInt8;
  return options;
}

// By layer of the model, K or V, KV head of the model.
using ByTensor = std::map<std::tuple<uint32_t, bool, uint32_t>, float>;

ByTensor ScalesOf(const ModelRunner& runner) {
  ByTensor all;
  for (const KvRank& rank : runner.ranks()) {
    const KvView view(rank.layout, {nullptr});
    EXPECT_TRUE(CheckScales(rank.layout, rank.layout.scales).ok());
    for (uint32_t layer = 0; layer < rank.shard.layer_count; ++layer) {
      for (uint32_t head = 0; head < rank.shard.head_count; ++head) {
        const uint32_t of_layer = rank.shard.layer_begin + layer;
        const uint32_t of_head = rank.shard.head_begin + head;
        all[{of_layer, false, of_head}] = view.KScale(layer, head);
        all[{of_layer, true, of_head}] = view.VScale(layer, head);
      }
    }
  }
  return all;
}

TEST(KvScalesTest, EverySplitFindsTheSame) {
  for (const KvScaling scaling : {KvScaling::kHead, KvScaling::kTensor}) {
    SCOPED_TRACE(KvScalingName(scaling));
    EngineOptions options = Int8Options();
    options.kv_scales = scaling;
    const ByTensor want = ScalesOf(*RunnerWith(options));
    EXPECT_EQ(want.size(), 6U * 2 * 4);
    options.tp = 2;
    options.pp = 3;
    options.kv_layout = KvFormat::kHnd;
    options.block_size = 7;
    EXPECT_EQ(ScalesOf(*RunnerWith(options)), want);
    options.tp = 4;
    options.pp = 1;
    options.kv_layout = KvFormat::kNhd;
    options.kv_cache = KvCacheKind::kVirtual;
    EXPECT_EQ(ScalesOf(*RunnerWith(options)), want);
  }
}

TEST(KvScalesTest, ATensorsScaleIsItsHeadsLargest) {
  EngineOptions options = Int8Options();
  const ByTensor heads = ScalesOf(*RunnerWith(options));
  options.kv_scales = KvScaling::kTensor;
  const ByTensor tensors = ScalesOf(*RunnerWith(options));
  bool heads_differ = false;
  for (const auto& [key, scale] : tensors) {
    const auto& [layer, v, head] = key;
    float largest = 0;
    for (uint32_t h = 0; h < 4; ++h) largest = std::max(largest, heads.at({layer, v, h}));
    EXPECT_EQ(scale, largest) << "layer " << layer << ", head " << head;
    heads_differ |= heads.at(key) != largest;
  }
  EXPECT_TRUE(heads_differ) << "or this test shows nothing";
}

TEST(KvScalesTest, TheLeastPowerOfTwoThatLeavesAQuarter) {
  const auto runner = [](DType dtype) {
    EngineOptions options = SmallOptions(kTinyModel);
    options.kv_dtype = dtype;
    return RunnerWith(options);
  };
  const auto wide = runner(DType::kFp32);
  const KvRank& rank = wide->ranks().front();
  const std::vector<uint32_t> ids = SampleTokens(wide->config());
  const auto tokens = static_cast<uint32_t>(ids.size());
  const auto blocks = wide->pool()->Allocate((tokens + 15) / 16);
  const StepItem item{.token_ids = ids, .blocks = blocks->blocks()};
  ASSERT_TRUE(wide->Step({&item, 1}));
  float largest = 0;  // of layer 1, head 1
  const KvView view(rank.layout, {rank.region.data()});
  for (uint32_t token = 0; token < tokens; ++token) {
    const BlockId block = blocks->blocks()[token / 16];
    const auto* k = reinterpret_cast<const float*>(view.K(1, block, 1, token % 16));
    for (uint32_t d = 0; d < rank.layout.head_dim; ++d)
      largest = std::max(largest, std::fabs(k[d]));
  }
  for (const auto& [dtype, most] :
       {std::pair{DType::kInt8, 127.0F}, std::pair{DType::kFp8E4m3, 448.0F},
        std::pair{DType::kFp8E5m2, 57344.0F}}) {
    const float scale = ScalesOf(*runner(dtype)).at({1, false, 1});
    int exponent = 0;
    EXPECT_EQ(std::frexp(scale, &exponent), 0.5F) << scale;
    EXPECT_GE(scale * most, largest * 1.25F) << DTypeName(dtype);
    EXPECT_LT(scale / 2 * most, largest * 1.25F) << DTypeName(dtype);
  }
}

TEST(KvScalesTest, WideCachesAndNoneHaveNone) {
  EngineOptions options = Int8Options();
  options.kv_scales = KvScaling::kNone;
  EXPECT_TRUE(RunnerWith(options)->ranks().front().layout.scales.empty());
  options = SmallOptions(kModel);
  options.kv_dtype = DType::kFp16;
  EXPECT_TRUE(RunnerWith(options)->ranks().front().layout.scales.empty());
}

}  // namespace
}  // namespace kvrelay::engine
