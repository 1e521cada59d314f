// Engines on a GPU beside those on the host. Needs a GPU and cuBLAS; skipped elsewhere.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <mutex>
#include <random>

#include "engine/cuda/platform_cuda.h"
#include "engine/sampler.h"
#include "tests/engine/engine_testing.h"

namespace kvrelay::engine::cuda {
namespace {

class EngineCudaTest : public testing::Test {
 protected:
  void SetUp() override {
    for (const DType dtype : {DType::kFp32, DType::kBf16, DType::kFp16}) {
      auto opened = OpenPlatform({.ordinals = {0}, .dtype = dtype});
      if (!opened) GTEST_SKIP() << opened.error().message();
      platforms_.push_back(*opened);
    }
  }
  std::shared_ptr<const Platform> Gpu(DType dtype) const {
    return *std::ranges::find_if(platforms_, [&](const auto& p) { return p->dtype() == dtype; });
  }
  static std::unique_ptr<ModelRunner> Runner(const EngineOptions& options,
                                             std::shared_ptr<const Platform> platform) {
    const auto config = LoadModelConfig(options.model_dir);
    const Checkpoint checkpoint = options.load_format == LoadFormat::kDummy
                                      ? Checkpoint::Dummy()
                                      : *Checkpoint::Open(options.model_dir);
    auto runner = ModelRunner::Create(*config, checkpoint, options, std::move(platform));
    if (!runner) ADD_FAILURE() << runner.error().ToString();
    return *std::move(runner);
  }
  static std::unique_ptr<Engine> MakeEngineOn(const EngineOptions& options,
                                              std::shared_ptr<const Platform> platform) {
    auto engine = Engine::Create(options, std::move(platform));
    if (!engine) ADD_FAILURE() << engine.error().ToString();
    return *std::move(engine);
  }

  std::vector<std::shared_ptr<const Platform>> platforms_;
};

std::vector<std::vector<uint32_t>> Answers(Engine& engine,
                                           const std::vector<std::vector<uint32_t>>& prompts,
                                           uint32_t tokens) {
  std::vector<std::future<Answer>> started;
  for (const auto& prompt : prompts)
    started.push_back(Start(engine, GreedyRequest(prompt, tokens)));
  std::vector<std::vector<uint32_t>> answers;
  for (auto& one : started) {
    Answer answer = Finish(std::move(one));
    EXPECT_TRUE(answer.outcome.status.ok()) << answer.outcome.status.ToString();
    answers.push_back(std::move(answer.token_ids));
  }
  return answers;
}

std::vector<std::vector<uint32_t>> Prompts(std::mt19937_64& random, size_t count, uint32_t vocab) {
  std::vector<std::vector<uint32_t>> prompts(count);
  for (auto& prompt : prompts) {
    prompt.resize(1 + random() % 60);
    for (uint32_t& id : prompt) id = static_cast<uint32_t>(random() % vocab);
  }
  return prompts;
}

// Logits along one sequence: a prompt in chunks, then tokens one by one.
std::vector<std::vector<float>> LogitsAlong(ModelRunner& runner, const std::vector<uint32_t>& ids,
                                            size_t prompt, size_t chunk) {
  const auto blocks = runner.pool()->Allocate(
      static_cast<uint32_t>((ids.size() + runner.block_size() - 1) / runner.block_size()));
  std::vector<std::vector<float>> all;
  for (size_t at = 0; at < ids.size();) {
    const size_t count = at < prompt ? std::min(chunk, prompt - at) : 1;
    StepItem item{.token_ids = std::span(ids).subspan(at, count),
                  .first_position = static_cast<uint32_t>(at),
                  .blocks = blocks->blocks(),
                  .want_logits = true};
    const auto results = runner.Step({&item, 1});
    if (!results) {
      ADD_FAILURE() << results.error().ToString();
      return all;
    }
    const auto logits = results->front().logits;
    EXPECT_EQ(results->front().token, Greedy(logits));
    all.emplace_back(logits.begin(), logits.end());
    at += count;
  }
  return all;
}

// The largest difference, as a part of the largest of `want`.
float Difference(const std::vector<std::vector<float>>& got,
                 const std::vector<std::vector<float>>& want) {
  EXPECT_EQ(got.size(), want.size());
  float scale = 0;
  float largest = 0;
  for (size_t i = 0; i < std::min(got.size(), want.size()); ++i) {
    for (size_t j = 0; j < want[i].size(); ++j) {
      scale = std::max(scale, std::fabs(want[i][j]));
      const float difference = std::fabs(got[i][j] - want[i][j]);
      largest = std::isnan(difference) ? INFINITY : std::max(largest, difference);
    }
  }
  return largest / scale;
}

// Every tiny model: together, in small chunks, on either order of the cache.
TEST_F(EngineCudaTest, Fp32TokensAreThoseOfTransformers) {
  for (const std::string& model : OracleModels()) {
    if (LoadModelConfig(SourcePath(model))->mla) continue;  // on the host alone
    for (const KvFormat layout : {KvFormat::kNhd, KvFormat::kHnd}) {
      EngineOptions options = SmallOptions(model);
      options.kv_layout = layout;
      options.prefill_chunk = layout == KvFormat::kHnd ? 7 : 256;
      const auto engine = MakeEngineOn(options, Gpu(DType::kFp32));
      std::vector<std::future<Answer>> started;
      const std::vector<OracleCase> cases = OracleCases(model);
      for (const OracleCase& one : cases) {
        started.push_back(
            Start(*engine, GreedyRequest(one.prompt, static_cast<uint32_t>(one.expected.size()))));
      }
      for (size_t i = 0; i < cases.size(); ++i) {
        const Answer answer = Finish(std::move(started[i]));
        EXPECT_TRUE(answer.outcome.status.ok()) << answer.outcome.status.ToString();
        EXPECT_EQ(answer.token_ids, cases[i].expected) << model << " " << cases[i].name;
      }
      engine->prefixes().Clear();  // of prompts that begin alike
      EXPECT_EQ(engine->pool()->free_blocks(), options.kv_blocks);
    }
  }
}

TEST_F(EngineCudaTest, Fp32TokensOfTheBundledModelAreTheHosts) {
  std::mt19937_64 random(TestSeed());
  EngineOptions options = SmallOptions("models/bard-4m");
  const auto prompts = Prompts(random, 12, 256);
  const auto want = Answers(*MakeEngine(options), prompts, 40);
  for (const bool eager : {false, true}) {
    options.enforce_eager = eager;
    EXPECT_EQ(Answers(*MakeEngineOn(options, Gpu(DType::kFp32)), prompts, 40), want)
        << (eager ? "eager" : "graphs");
  }
}

// Measured: see the printed values. bf16 keeps 8 bits, fp16 11; activations are rounded some ten
// times a layer.
TEST_F(EngineCudaTest, LogitsInHalfPrecisionAreClose) {
  std::mt19937_64 random(TestSeed());
  for (const std::string model : {"tests/engine/data/tiny-gqa", "models/bard-4m"}) {
    const std::vector<uint32_t> ids = [&] {
      std::vector<uint32_t> out(80);
      for (uint32_t& id : out) id = static_cast<uint32_t>(random() % 96);
      return out;
    }();
    const EngineOptions options = SmallOptions(model);
    const auto want = LogitsAlong(*Runner(options, HostPlatform()), ids, 60, 16);
    for (const auto& [dtype, bound] :
         {std::pair{DType::kFp32, 2e-5F}, {DType::kFp16, 0.01F}, {DType::kBf16, 0.06F}}) {
      const auto got = LogitsAlong(*Runner(options, Gpu(dtype)), ids, 60, 16);
      const float difference = Difference(got, want);
      std::cout << model << " " << DTypeName(dtype) << ": " << difference << "\n";
      EXPECT_LT(difference, bound) << model << " " << DTypeName(dtype);
    }
  }
}

// A graph replays what an eager step launches: bit by bit, for batches that are padded, too.
TEST_F(EngineCudaTest, GraphsChangeNoBit) {
  std::mt19937_64 random(TestSeed());
  for (const DType dtype : {DType::kFp32, DType::kBf16}) {
    std::vector<std::vector<uint32_t>> last;
    for (const bool eager : {false, true}) {
      EngineOptions options = SmallOptions("models/bard-4m");
      options.enforce_eager = eager;
      const auto runner = Runner(options, Gpu(dtype));
      const auto blocks = runner->pool()->Allocate(8);
      std::vector<std::vector<uint32_t>> tokens(8, {1});
      for (uint32_t i = 0; i < 8; ++i) tokens[i][0] = 60 + i;
      for (uint32_t position = 0; position < 16; ++position) {
        std::vector<StepItem> items;
        for (uint32_t i = 0; i < 8; ++i) {
          items.push_back({.token_ids = std::span(tokens[i]).last(1),
                           .first_position = position,
                           .blocks = blocks->blocks().subspan(i, 1),
                           .want_token = true});
        }
        const auto results = runner->Step(items);
        ASSERT_TRUE(results) << results.error().ToString();
        for (uint32_t i = 0; i < 8; ++i) tokens[i].push_back(*(*results)[i].token);
      }
      if (eager) {
        EXPECT_EQ(tokens, last) << DTypeName(dtype);
      }
      last = tokens;
    }
  }
}

// Batches shrink and grow through all paddings, with requests of every length.
TEST_F(EngineCudaTest, ManyRequestsGetWhatEachGetsAlone) {
  std::mt19937_64 random(TestSeed());
  EngineOptions options = SmallOptions("tests/engine/data/tiny-gqa");
  options.max_batch = 21;
  const auto engine = MakeEngineOn(options, Gpu(DType::kFp32));
  const auto prompts = Prompts(random, 40, 96);
  const auto together = Answers(*engine, prompts, 24);
  const auto host = Answers(*MakeEngine(options), prompts, 24);
  EXPECT_EQ(together, host);
}

TEST_F(EngineCudaTest, RanksAndStagesOnOneGpuAgree) {
  std::mt19937_64 random(TestSeed());
  const auto prompts = Prompts(random, 6, 96);
  const EngineOptions options = SmallOptions("tests/engine/data/tiny-gqa");
  const auto want = Answers(*MakeEngine(options), prompts, 20);
  for (const auto& [tp, pp] : {std::pair{2U, 1U}, {4U, 1U}, {1U, 2U}, {2U, 2U}}) {
    EngineOptions split = options;
    split.tp = tp;
    split.pp = pp;
    EXPECT_EQ(Answers(*MakeEngineOn(split, Gpu(DType::kFp32)), prompts, 20), want)
        << "tp " << tp << ", pp " << pp;
  }
}

// Llama's shapes with heads of 64: decoding rows go through the relay kernels.
TEST_F(EngineCudaTest, RelayReadsSharedPrefixes) {
  std::mt19937_64 random(TestSeed());
  TempDir dir;
  dir.Write("config.json", R"({"architectures": ["LlamaForCausalLM"], "model_type": "llama",
    "vocab_size": 512, "hidden_size": 512, "intermediate_size": 1024, "num_hidden_layers": 4,
    "num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 64,
    "max_position_embeddings": 2048, "rms_norm_eps": 1e-5, "rope_theta": 10000.0,
    "tie_word_embeddings": false, "hidden_act": "silu", "torch_dtype": "bfloat16"})");
  EngineOptions options;
  options.model_dir = dir.path();
  options.load_format = LoadFormat::kDummy;
  options.kv_blocks = 512;
  std::vector<uint32_t> system(200);
  for (uint32_t& id : system) id = static_cast<uint32_t>(random() % 512);
  const auto prompts = Prompts(random, 8, 512);
  std::vector<std::vector<float>> logits[2];
  for (const RelayMode mode : {RelayMode::kOff, RelayMode::kOn}) {
    options.relay = mode;
    const auto runner = Runner(options, Gpu(DType::kBf16));
    std::cout << runner->attn_backend().ToString() << "\n";
    EXPECT_EQ(runner->attn_backend().backend,
              mode == RelayMode::kOn ? attention::Backend::kRelay : attention::Backend::kPaged);
    const auto prefix = runner->pool()->Allocate(12);
    const std::span<const uint32_t> shared = std::span(system).first(192);
    const StepItem first{.token_ids = shared, .blocks = prefix->blocks()};
    ASSERT_TRUE(runner->Step({&first, 1}));
    std::vector<BlockTable> tables;
    std::vector<std::vector<uint32_t>> last(prompts.size());
    for (const auto& prompt : prompts) {
      tables.push_back(*runner->pool()->Allocate(5));
      const StepItem item{.token_ids = prompt,
                          .first_position = 192,
                          .prefix = prefix->blocks(),
                          .blocks = tables.back().blocks()};
      ASSERT_TRUE(runner->Step({&item, 1}));
    }
    for (uint32_t step = 0; step < 4; ++step) {
      std::vector<StepItem> items;
      for (size_t i = 0; i < prompts.size(); ++i) {
        last[i] = {step * 7 + static_cast<uint32_t>(i)};
        items.push_back({.token_ids = last[i],
                         .first_position = 192 + static_cast<uint32_t>(prompts[i].size()) + step,
                         .prefix = prefix->blocks(),
                         .blocks = tables[i].blocks(),
                         .want_logits = true});
      }
      const auto results = runner->Step(items);
      ASSERT_TRUE(results) << results.error().ToString();
      for (const ItemResult& result : *results) {
        EXPECT_EQ(result.relay, mode == RelayMode::kOn);
        logits[mode == RelayMode::kOn].emplace_back(result.logits.begin(), result.logits.end());
      }
    }
  }
  const float difference = Difference(logits[1], logits[0]);
  std::cout << "relay against paged: " << difference << "\n";
  EXPECT_LT(difference, 0.03F);
}

// What a streaming pull follows: each layer in turn, the chunk's end at last, when it is in the
// cache.
TEST_F(EngineCudaTest, LayersAreToldOfInOrder) {
  const auto runner = Runner(SmallOptions("models/bard-4m"), Gpu(DType::kBf16));
  const auto blocks = runner->pool()->Allocate(4);
  const std::vector<uint32_t> ids(50, 65);
  std::vector<Progress> seen;
  const ProgressFn progress = [&](uint32_t rank, const Progress& at) {
    EXPECT_EQ(rank, 0U);
    seen.push_back(at);
  };
  const ProgressFn* const fns[] = {&progress};
  const StepItem item{.token_ids = ids, .blocks = blocks->blocks(), .progress = fns};
  ASSERT_TRUE(runner->Step({&item, 1}));
  const uint32_t layers = runner->config().num_layers;
  ASSERT_EQ(seen.size(), layers);
  for (uint32_t layer = 1; layer < layers; ++layer) {
    EXPECT_EQ(seen[layer - 1].layers, layer);
    EXPECT_EQ(seen[layer - 1].tokens, 0U);
  }
  EXPECT_EQ(seen.back().tokens, 50U);
}

TEST_F(EngineCudaTest, WhatCannotRunIsRefused) {
  EngineOptions options = SmallOptions("tests/engine/data/tiny-gqa");
  options.kv_cache = KvCacheKind::kVirtual;
  EXPECT_EQ(Engine::Create(options, Gpu(DType::kBf16)).error().code(), Code::kInvalidArgument);
  options = SmallOptions("tests/engine/data/tiny-gqa");
  options.attn_backend = "naive_attn";
  EXPECT_EQ(Engine::Create(options, Gpu(DType::kBf16)).error().code(), Code::kIncompatible);
  options.attn_backend = "";
  options.kv_dtype = DType::kFp8E4m3;
  EXPECT_EQ(Engine::Create(options, Gpu(DType::kBf16)).error().code(), Code::kInvalidArgument);
  options = SmallOptions("tests/engine/data/tiny-deepseek");
  EXPECT_EQ(Engine::Create(options, Gpu(DType::kBf16)).error().code(), Code::kInvalidArgument);
  EXPECT_EQ(OpenPlatform({.ordinals = {1000}}).error().code(), Code::kInvalidArgument);
  const auto two = OpenPlatform({.ordinals = {0, 0}, .dtype = DType::kBf16});
  ASSERT_TRUE(two) << two.error().ToString();
  options = SmallOptions("tests/engine/data/tiny-gqa");
  EXPECT_EQ(Engine::Create(options, *two).error().code(), Code::kInvalidArgument);
}

}  // namespace
}  // namespace kvrelay::engine::cuda
