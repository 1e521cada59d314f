// The engine on a virtual cache computes what it computes on a paged one, with less memory.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "engine_testing.h"
#include "kvcache/virtual_kv_cache.h"

namespace kvrelay::engine {
namespace {

using testing::HasSubstr;

EngineOptions VirtualOptions() {
  EngineOptions options = SmallOptions("models/bard-4m");
  options.kv_cache = KvCacheKind::kVirtual;
  return options;
}

std::vector<uint32_t> SomeIds(uint32_t count, uint32_t seed) {
  std::vector<uint32_t> ids(count);
  for (uint32_t i = 0; i < count; ++i) ids[i] = 2 + (i * 7 + seed * 31 + i * i * 3) % 250;
  return ids;
}

// 14 requests of unlike lengths, most of them behind one of two system prompts.
std::vector<std::vector<uint32_t>> AnswersOf(Engine& engine) {
  std::vector<std::future<Answer>> waiting;
  for (uint32_t i = 0; i < 14; ++i) {
    Request request = GreedyRequest(SomeIds(1 + i * 13, i), 12 + i);
    if (i % 3 != 0) request.system_ids = SomeIds(70 + i % 3 * 10, 100 + i % 3);
    waiting.push_back(Start(engine, std::move(request)));
  }
  std::vector<std::vector<uint32_t>> answers;
  for (auto& one : waiting) {
    const Answer answer = Finish(std::move(one));
    EXPECT_TRUE(answer.outcome.status.ok()) << answer.outcome.status.ToString();
    answers.push_back(answer.token_ids);
  }
  return answers;
}

TEST(VirtualKvEngine, GivesTheTokensOfAPagedOne) {
  const auto expected = AnswersOf(*MakeEngine(SmallOptions("models/bard-4m")));
  struct Variant {
    const char* name;
    void (*change)(EngineOptions&);
  };
  const Variant variants[] = {
      {"layers inside", [](EngineOptions&) {}},
      {"a range for each head", [](EngineOptions& o) { o.kv_layout = KvFormat::kHnd; }},
      // Rows of unequal ranks, blocks that end inside pages.
      {"stages",
       [](EngineOptions& o) {
         o.pp = 2;
         o.pp_layers = {1, 5};
         o.block_size = 24;
       }},
      {"a pool for a few at a time", [](EngineOptions& o) { o.kv_blocks = 48; }},
      {"large pages",
       [](EngineOptions& o) {
         o.tp = 2;
         o.kv_page_bytes = 2 << 20;
         o.kv_blocks = 1000;
       }},
  };
  for (const Variant& variant : variants) {
    SCOPED_TRACE(variant.name);
    EngineOptions options = VirtualOptions();
    variant.change(options);
    const auto engine = MakeEngine(options);
    EXPECT_EQ(AnswersOf(*engine), expected);
    engine->Stop({Code::kCancelled, "over"});
    engine->prefixes().Clear();
    EXPECT_EQ(engine->pool()->used_blocks(), 0U);
    EXPECT_EQ(engine->pool()->free_blocks(), engine->pool()->num_blocks());
  }
}

TEST(VirtualKvEngine, HasMemoryForTheTokensThatAreThere) {
  EngineOptions options = VirtualOptions();
  options.kv_blocks = 1024;
  const auto engine = MakeEngine(options);
  const VirtualKvCache& cache = *engine->runner().virtual_cache();
  EXPECT_EQ(cache.metrics().optimized_memory_mb, 0.0);
  // 6 KiB a token, 10 of them a page; room for 1500 tokens is promised.
  Request request = GreedyRequest(SomeIds(30, 1), 1500);
  uint32_t answered = 0;
  request.on_tokens = [&](RequestNumber number, std::span<const uint32_t>) {
    if (++answered < 20) return;
    const VirtualKvMetrics metrics = cache.metrics();
    EXPECT_GE(metrics.optimized_memory_mb, 49 * 6.0 / 1024);
    EXPECT_LT(metrics.optimized_memory_mb, 2.0) << "of 9 for the whole answer";
    EXPECT_GT(metrics.utilization, 0.0);
    EXPECT_GT(metrics.memory_savings_percent, 90.0);
    if (answered == 20) engine->Cancel(number);
  };
  (void)Finish(Start(*engine, std::move(request)));
  EXPECT_EQ(engine->pool()->used_blocks(), 0U);
}

TEST(VirtualKvEngine, RefusesPagesThatTheHostDoesNotHave) {
  for (const uint64_t page : {uint64_t{4096}, uint64_t{4} << 20, uint64_t{100000}}) {
    EngineOptions options = VirtualOptions();
    options.kv_page_bytes = page;
    const auto engine = Engine::Create(options);
    ASSERT_FALSE(engine.has_value());
    EXPECT_THAT(engine.error().ToString(), HasSubstr(std::to_string(page)));
  }
  EngineOptions options = VirtualOptions();
  options.kv_blocks = 1;
  options.kv_page_bytes = 2 << 20;
  EXPECT_EQ(Engine::Create(options).error().code(), Code::kInvalidArgument);
}

}  // namespace
}  // namespace kvrelay::engine
