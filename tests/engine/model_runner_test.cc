#include "engine/model_runner.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <mutex>
#include <numeric>
#include <random>

#include "engine/sampler.h"
#include "engine_testing.h"

namespace kvrelay::engine {
namespace {

using testing::HasSubstr;

std::unique_ptr<ModelRunner> MakeRunner(const EngineOptions& options) {
  const auto config = LoadModelConfig(options.model_dir);
  const auto checkpoint = Checkpoint::Open(options.model_dir);
  auto runner = ModelRunner::Create(*config, *checkpoint, options);
  if (!runner) ADD_FAILURE() << runner.error().ToString();
  return std::move(runner).value();
}

std::vector<uint32_t> RandomIds(std::mt19937_64& random, size_t count) {
  std::vector<uint32_t> ids(count);
  for (uint32_t& id : ids) id = static_cast<uint32_t>(random() % 96);
  return ids;
}

float LargestDifference(std::span<const float> a, std::span<const float> b) {
  EXPECT_EQ(a.size(), b.size());
  float largest = 0;
  for (size_t i = 0; i < a.size(); ++i) largest = std::max(largest, std::fabs(a[i] - b[i]));
  return largest;
}

// Sums in another order round differently: by up to 5e-6 of the largest logit over 5400 draws.
constexpr float kRounding = 1e-5F;

// Against the largest of `b`.
float RelativeDifference(std::span<const float> a, std::span<const float> b) {
  float scale = 0;
  for (const float x : b) scale = std::max(scale, std::fabs(x));
  return LargestDifference(a, b) / scale;
}

std::vector<float> Copy(std::span<const float> logits) { return {logits.begin(), logits.end()}; }

// The last token's logits of a prompt in a fresh cache, run in chunks of `chunk`.
std::vector<float> LogitsOf(ModelRunner& runner, const std::vector<uint32_t>& ids, size_t chunk) {
  const auto blocks = runner.pool()->Allocate(
      static_cast<uint32_t>((ids.size() + runner.block_size() - 1) / runner.block_size()));
  std::vector<float> logits;
  for (size_t at = 0; at < ids.size(); at += chunk) {
    StepItem item;
    item.token_ids = std::span(ids).subspan(at, std::min(chunk, ids.size() - at));
    item.first_position = static_cast<uint32_t>(at);
    item.blocks = blocks->blocks();
    item.want_logits = at + chunk >= ids.size();
    const auto results = runner.Step({&item, 1});
    EXPECT_TRUE(results) << results.error().ToString();
    if (item.want_logits) logits = Copy((*results)[0].logits);
  }
  return logits;
}

TEST(ModelRunnerTest, ChunksSplitsAndLayoutsAgree) {
  std::mt19937_64 random(TestSeed());
  const std::vector<uint32_t> ids = RandomIds(random, 45);
  const std::vector<float> want = LogitsOf(*MakeRunner(SmallOptions(kTinyModel)), ids, ids.size());
  ASSERT_EQ(want.size(), 96U);
  for (const uint32_t tp : {1U, 2U, 4U}) {
    for (const KvFormat layout : {KvFormat::kNhd, KvFormat::kHnd}) {
      EngineOptions options = SmallOptions(kTinyModel);
      options.tp = tp;
      options.kv_layout = layout;
      options.block_size = 7;
      const auto runner = MakeRunner(options);
      for (const size_t chunk : {tp == 1 ? size_t{1} : size_t{7}, size_t{16}, ids.size()}) {
        EXPECT_LT(RelativeDifference(LogitsOf(*runner, ids, chunk), want), kRounding)
            << "tp " << tp << ", " << KvFormatName(layout) << ", chunks of " << chunk;
      }
    }
  }
}

// Ranks have parts of the vocabulary each; nobody reads logits where only the token is wanted.
TEST(ModelRunnerTest, TheLikeliestTokenIsThatOfAllRanks) {
  std::mt19937_64 random(TestSeed());
  const std::vector<uint32_t> ids = RandomIds(random, 30);
  const std::vector<float> logits = LogitsOf(*MakeRunner(SmallOptions(kTinyModel)), ids, 30);
  for (const uint32_t tp : {1U, 2U, 4U}) {
    EngineOptions options = SmallOptions(kTinyModel);
    options.tp = tp;
    const auto runner = MakeRunner(options);
    const auto blocks = runner->pool()->Allocate(2);
    const StepItem item = {.token_ids = ids, .blocks = blocks->blocks(), .want_token = true};
    const auto results = runner->Step({&item, 1});
    ASSERT_TRUE(results) << results.error().ToString();
    EXPECT_TRUE(results->front().logits.empty());
    EXPECT_EQ(results->front().token, Greedy(logits)) << "tp " << tp;
  }
}

// Logits on a prompt with a narrow cache against fp64 attention over an fp32 one, as a part of the
// largest logit.
void ExpectNarrowCachesClose(const std::string& model, const std::vector<uint32_t>& ids,
                             const std::vector<std::pair<DType, float>>& bounds) {
  EngineOptions reference = SmallOptions(model);
  reference.attn_backend = "naive_attn";
  const std::vector<float> want = LogitsOf(*MakeRunner(reference), ids, 9);
  for (const auto& [dtype, bound] : bounds) {
    EngineOptions options = SmallOptions(model);
    options.kv_dtype = dtype;
    const float difference = RelativeDifference(LogitsOf(*MakeRunner(options), ids, 9), want);
    EXPECT_LT(difference, bound) << DTypeName(dtype);
    EXPECT_GT(difference, 0) << DTypeName(dtype);
  }
}

TEST(ModelRunnerTest, HalfPrecisionCachesAreClose) {
  std::mt19937_64 random(TestSeed());
  ExpectNarrowCachesClose(kTinyModel, RandomIds(random, 45),
                          {{DType::kFp16, 0.01F}, {DType::kBf16, 0.08F}});
}

// Words, which a trained model is sure about. (Random weights on random ids are not: there an fp8
// cache moves logits by up to half the largest.)
TEST(ModelRunnerTest, CachesOfOneByteAreClose) {
  const std::string text =
      "KING LEAR. Blow, winds, and crack your cheeks! rage! blow! You cataracts and hurricanoes, "
      "spout till you have drench'd our steeples, drown'd the cocks! You sulphurous and";
  std::vector<uint32_t> ids = {0};
  for (const char c : text) ids.push_back(static_cast<uint8_t>(c) + 3U);
  ExpectNarrowCachesClose("models/bard-4m", ids,
                          {{DType::kFp16, 0.002F},
                           {DType::kBf16, 0.01F},
                           {DType::kFp8E4m3, 0.1F},
                           {DType::kFp8E5m2, 0.15F},
                           {DType::kInt8, 0.05F}});
}

// 16 sequences of different length, alone and in one batch, with a prompt chunk between them.
TEST(ModelRunnerTest, TheBatchChangesNothingThatCounts) {
  std::mt19937_64 random(TestSeed());
  const auto runner = MakeRunner(SmallOptions(kTinyModel));
  std::vector<std::vector<uint32_t>> ids;
  std::vector<std::vector<float>> alone;
  std::vector<BlockTable> tables;
  for (size_t i = 0; i < 17; ++i) {
    ids.push_back(RandomIds(random, 5 + 3 * i));
    alone.push_back(LogitsOf(*runner, ids.back(), 64));
  }
  // Everything but the last token (but the last five of sequence 16) goes into the cache first.
  const auto tail = [](size_t i) { return i == 16 ? size_t{5} : size_t{1}; };
  std::vector<StepItem> items(ids.size());
  for (size_t i = 0; i < ids.size(); ++i) {
    tables.push_back(*runner->pool()->Allocate(static_cast<uint32_t>(ids[i].size() / 16 + 1)));
    items[i].token_ids = std::span(ids[i]).first(ids[i].size() - tail(i));
    items[i].blocks = tables[i].blocks();
  }
  ASSERT_TRUE(runner->Step(items));
  for (size_t i = 0; i < ids.size(); ++i) {
    items[i].first_position = static_cast<uint32_t>(ids[i].size() - tail(i));
    items[i].token_ids = std::span(ids[i]).last(tail(i));
    items[i].want_logits = true;
  }
  const auto results = runner->Step(items);
  ASSERT_TRUE(results);
  float largest = 0;
  for (size_t i = 0; i < ids.size(); ++i) {
    largest = std::max(largest, RelativeDifference((*results)[i].logits, alone[i]));
    EXPECT_EQ(Greedy((*results)[i].logits), Greedy(alone[i])) << i;
  }
  RecordProperty("largest_relative_difference", std::to_string(largest));
  EXPECT_LT(largest, kRounding);
}

TEST(ModelRunnerTest, RelayAndPagedAgree) {
  std::mt19937_64 random(TestSeed());
  const std::vector<uint32_t> system = RandomIds(random, 48);
  std::vector<std::vector<float>> logits[2];
  for (const RelayMode mode : {RelayMode::kOn, RelayMode::kOff}) {
    EngineOptions options = SmallOptions(kTinyModel);
    options.relay = mode;
    const auto runner = MakeRunner(options);
    const BlockTable prefix = *runner->pool()->Allocate(3);
    const StepItem fill{.token_ids = system, .blocks = prefix.blocks()};
    ASSERT_TRUE(runner->Step({&fill, 1}));
    std::mt19937_64 tails(7);
    std::vector<std::vector<uint32_t>> ids;
    std::vector<BlockTable> tables;
    std::vector<StepItem> items;
    for (size_t i = 0; i < 5; ++i) {
      ids.push_back(RandomIds(tails, 1 + 4 * i));
      tables.push_back(*runner->pool()->Allocate(2));
    }
    for (size_t i = 0; i < 5; ++i) {
      items.push_back({.token_ids = ids[i],
                       .first_position = 48,
                       .prefix = prefix.blocks(),
                       .blocks = tables[i].blocks(),
                       .want_logits = true});
    }
    const auto results = runner->Step(items);
    ASSERT_TRUE(results);
    for (const ItemResult& result : *results) {
      EXPECT_EQ(result.relay, mode == RelayMode::kOn);
      EXPECT_EQ(result.why, mode == RelayMode::kOn ? "prefix shared by 5" : "disabled");
      logits[mode == RelayMode::kOn].push_back(Copy(result.logits));
    }
  }
  for (size_t i = 0; i < 5; ++i)
    EXPECT_LT(RelativeDifference(logits[0][i], logits[1][i]), kRounding);
}

TEST(ModelRunnerTest, ProgressIsToldPerRankAndLayer) {
  EngineOptions options = SmallOptions(kTinyModel);
  options.tp = 2;
  const auto runner = MakeRunner(options);
  std::vector<std::vector<Progress>> seen(2);  // by rank: each rank's own thread
  const ProgressFn fn = [&](uint32_t rank, const Progress& progress) {
    seen[rank].push_back(progress);
  };
  const ProgressFn* const fns[] = {&fn};
  const std::vector<uint32_t> ids(20, 3);
  const auto blocks = runner->pool()->Allocate(2);
  for (const uint32_t at : {0U, 12U}) {
    const StepItem item{.token_ids = std::span(ids).subspan(at, at == 0 ? 12 : 8),
                        .first_position = at,
                        .blocks = blocks->blocks(),
                        .progress = fns};
    ASSERT_TRUE(runner->Step({&item, 1}));
  }
  for (const auto& rank : seen) {
    EXPECT_THAT(rank, testing::ElementsAre(Progress{0, 12, 1}, Progress{12, 12, 0},
                                           Progress{12, 20, 1}, Progress{20, 20, 0}));
    for (size_t i = 1; i < rank.size(); ++i) EXPECT_GT(rank[i].Pack(), rank[i - 1].Pack());
  }
}

// The same sums in the same order, however the layers lie on stages: not a bit differs.
TEST(ModelRunnerTest, StagesChangeNothing) {
  constexpr const char* kThreeLayers = "tests/engine/data/tiny-head-dim";
  std::mt19937_64 random(TestSeed());
  std::vector<uint32_t> ids = RandomIds(random, 45);
  for (uint32_t& id : ids) id %= 83;  // its vocabulary
  for (const uint32_t tp : {1U, 2U}) {
    EngineOptions options = SmallOptions(kThreeLayers);
    options.tp = tp;
    const std::vector<float> want = LogitsOf(*MakeRunner(options), ids, 16);
    for (const std::vector<uint32_t>& layers :
         {std::vector<uint32_t>{}, {1, 2}, {2, 1}, {1, 1, 1}}) {
      options.pp = layers.empty() ? 2 : static_cast<uint32_t>(layers.size());
      options.pp_layers = layers;
      const auto runner = MakeRunner(options);
      EXPECT_EQ(runner->ranks().size(), tp * options.pp);
      EXPECT_EQ(LogitsOf(*runner, ids, 16), want) << "tp " << tp << ", pp " << options.pp;
    }
  }
}

TEST(ModelRunnerTest, EachStageHoldsItsLayersAndTellsOfThem) {
  EngineOptions options = SmallOptions("tests/engine/data/tiny-head-dim");  // 3 layers
  options.tp = 2;
  options.pp = 2;
  const auto runner = MakeRunner(options);
  std::vector<std::pair<uint32_t, uint32_t>> layers;
  for (const KvRank& rank : runner->ranks()) {
    EXPECT_EQ(rank.layout.layers(), rank.shard.layer_count);
    layers.emplace_back(rank.shard.layer_begin, rank.shard.layer_count);
  }
  using Held = std::pair<uint32_t, uint32_t>;
  EXPECT_THAT(layers, testing::ElementsAre(Held{0, 2}, Held{0, 2}, Held{2, 1}, Held{2, 1}));

  std::vector<std::vector<Progress>> seen(4);
  const ProgressFn fn = [&](uint32_t rank, const Progress& progress) {
    seen[rank].push_back(progress);
  };
  const ProgressFn* const fns[] = {&fn};
  const std::vector<uint32_t> ids(12, 3);
  const auto blocks = runner->pool()->Allocate(1);
  const StepItem item{.token_ids = ids, .blocks = blocks->blocks(), .progress = fns};
  ASSERT_TRUE(runner->Step({&item, 1}));
  for (const uint32_t rank : {0U, 1U}) {
    EXPECT_THAT(seen[rank], testing::ElementsAre(Progress{0, 12, 1}, Progress{12, 12, 0}));
    EXPECT_THAT(seen[rank + 2], testing::ElementsAre(Progress{12, 12, 0}));
  }

  const auto refusal = [&](uint32_t pp, const std::vector<uint32_t>& split) {
    options.pp = pp;
    options.pp_layers = split;
    return ModelRunner::Create(*LoadModelConfig(options.model_dir),
                               *Checkpoint::Open(options.model_dir), options)
        .error()
        .message();
  };
  EXPECT_THAT(refusal(4, {}), HasSubstr("pp = 4 is more than num_hidden_layers = 3"));
  for (const std::vector<uint32_t>& split : {std::vector<uint32_t>{3}, {1, 1}, {3, 0}, {2, 2}}) {
    EXPECT_THAT(refusal(2, split), HasSubstr("are not the layers of pp = 2 stages"));
  }
}

TEST(ModelRunnerTest, BadItemsAreRefusedBeforeAnythingRuns) {
  const auto runner = MakeRunner(SmallOptions(kTinyModel));
  const std::vector<uint32_t> ids(20, 3);
  const std::vector<uint32_t> alien = {96};
  const std::vector<BlockId> one = {0};
  const std::vector<BlockId> nowhere = {5000};
  const std::pair<StepItem, const char*> bad[] = {
      {{.token_ids = {}, .blocks = one}, "without tokens"},
      {{.token_ids = alien, .blocks = one}, "token id 96"},
      {{.token_ids = ids, .blocks = one}, "position 19"},
      {{.token_ids = std::span(ids).first(1), .blocks = nowhere}, "no block 5000"},
      {{.token_ids = std::span(ids).first(1), .prefix = one, .blocks = one}, "shared prefix"},
  };
  for (const auto& [item, says] : bad) {
    const auto results = runner->Step({&item, 1});
    ASSERT_FALSE(results) << says;
    EXPECT_THAT(results.error().message(), HasSubstr(says));
  }
}

TEST(ModelRunnerTest, TheCacheIsMadeToMeasure) {
  EngineOptions options = SmallOptions(kTinyModel);
  options.tp = 2;
  options.kv_bytes = 1 << 20;
  auto runner = MakeRunner(options);
  // 2 layers x K and V x 1 head x 8 elements x 4 bytes x 16 tokens on each of 2 ranks.
  EXPECT_EQ(runner->pool()->num_blocks(), (1U << 20) / (2 * 2 * 8 * 4 * 16 * 2));
  EXPECT_EQ(runner->kv_bytes(), 1U << 20);
  EXPECT_EQ(runner->ranks()[1].shard.head_begin, 1U);

  const auto config = LoadModelConfig(options.model_dir);
  const auto checkpoint = Checkpoint::Open(options.model_dir);
  options.kv_bytes = 100;
  EXPECT_THAT(ModelRunner::Create(*config, *checkpoint, options).error().message(),
              HasSubstr("hold no block"));
  options.kv_bytes = uint64_t{1} << 45;
  options.block_size = 4096;
  const Status memory = ModelRunner::Create(*config, *checkpoint, options).error();
  EXPECT_EQ(memory.code(), Code::kResourceExhausted);
  EXPECT_THAT(memory.message(), HasSubstr("available"));
  options = SmallOptions(kTinyModel);
  options.tp = 3;
  EXPECT_THAT(ModelRunner::Create(*config, *checkpoint, options).error().message(),
              HasSubstr("tp = 3 does not divide num_attention_heads = 4"));
}

}  // namespace
}  // namespace kvrelay::engine
