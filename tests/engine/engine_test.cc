#include "engine/engine.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <chrono>
#include <thread>

#include "engine_testing.h"

namespace kvrelay::engine {
namespace {

using testing::HasSubstr;

TimePoint In(int64_t ms) { return TimePoint(std::chrono::steady_clock::now()) + Millis(ms); }

// A request that the engine's thread stands in, at its first token, until released.
struct Gate {
  std::promise<void> reached;
  std::promise<void> open;
  Request Hold(uint32_t max_new_tokens) {
    Request request = GreedyRequest({1, 2, 3}, max_new_tokens);
    auto first = std::make_shared<bool>(true);
    request.on_tokens = [this, first](RequestNumber, std::span<const uint32_t>) {
      if (!std::exchange(*first, false)) return;
      reached.set_value();
      open.get_future().wait_for(std::chrono::seconds(30));
    };
    return request;
  }
};

TEST(EngineTest, RequestsFromManyThreadsGetTheirOwnAnswers) {
  const auto cases = OracleCases(kTinyModel);
  const auto engine = MakeEngine(SmallOptions(kTinyModel));
  std::vector<std::thread> threads;
  for (int t = 0; t < 4; ++t) {
    threads.emplace_back([&] {
      for (const OracleCase& one : cases) {
        const Answer answer = Finish(
            Start(*engine, GreedyRequest(one.prompt, static_cast<uint32_t>(one.expected.size()))));
        EXPECT_EQ(answer.token_ids, one.expected);
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  engine->prefixes().Clear();  // of prompts that ran at the same time
  EXPECT_EQ(engine->pool()->used_blocks(), 0U);
  engine->Stop({Code::kCancelled, "over"});  // counts are those of the last step
  EXPECT_EQ(engine->counts().finished_ok, 4 * cases.size());
}

TEST(EngineTest, SampledAnswersDoNotDependOnCompany) {
  const auto engine = MakeEngine(SmallOptions(kTinyModel));
  const auto make = [](uint64_t seed) {
    Request request = GreedyRequest({5, 6, 7}, 24);
    request.sampling = {.temperature = 0.8, .top_p = 0.95, .seed = seed};
    return request;
  };
  std::vector<std::vector<uint32_t>> alone;
  for (uint64_t seed = 0; seed < 8; ++seed) {
    alone.push_back(Finish(Start(*engine, make(seed))).token_ids);
  }
  std::vector<std::future<Answer>> together;
  for (uint64_t seed = 0; seed < 8; ++seed) together.push_back(Start(*engine, make(seed)));
  for (uint64_t seed = 0; seed < 8; ++seed) {
    EXPECT_EQ(Finish(std::move(together[seed])).token_ids, alone[seed]);
  }
  EXPECT_NE(alone[0], alone[1]);
}

TEST(EngineTest, AFullQueueRefusesAtOnce) {
  EngineOptions options = SmallOptions(kTinyModel);
  options.max_batch = 1;
  options.max_queue = 2;
  const auto engine = MakeEngine(options);
  Gate gate;
  auto held = Start(*engine, gate.Hold(3));
  gate.reached.get_future().wait();
  std::vector<std::future<Answer>> waiting;
  for (int i = 0; i < 2; ++i) waiting.push_back(Start(*engine, GreedyRequest({1}, 2)));
  const auto refused = engine->Submit(GreedyRequest({1}, 2));
  // The engine stands in its callback: nothing moves meanwhile, so the third one is one too many
  // (the batch's place is counted free until the first step has ended).
  if (refused) {
    const auto one_more = engine->Submit(GreedyRequest({1}, 2));
    ASSERT_FALSE(one_more);
    EXPECT_EQ(one_more.error().code(), Code::kOverloaded);
    EXPECT_THAT(one_more.error().message(), HasSubstr("max_queue = 2"));
  } else {
    EXPECT_EQ(refused.error().code(), Code::kOverloaded);
    EXPECT_THAT(refused.error().message(), HasSubstr("max_queue = 2"));
  }
  gate.open.set_value();
  EXPECT_TRUE(Finish(std::move(held)).outcome.status.ok());
  for (auto& one : waiting) EXPECT_TRUE(Finish(std::move(one)).outcome.status.ok());
}

TEST(EngineTest, CancelEndsARequestSoon) {
  const auto engine = MakeEngine(SmallOptions(kTinyModel));
  std::promise<RequestNumber> started;
  Request request = GreedyRequest({1, 2}, 400);
  auto first = std::make_shared<bool>(true);
  request.on_tokens = [&started, first](RequestNumber number, std::span<const uint32_t>) {
    if (std::exchange(*first, false)) started.set_value(number);
  };
  auto answer = Start(*engine, std::move(request));
  engine->Cancel(started.get_future().get());
  const Answer end = Finish(std::move(answer));
  EXPECT_EQ(end.outcome.reason, FinishReason::kCancelled);
  EXPECT_EQ(end.outcome.status.code(), Code::kCancelled);
  EXPECT_LT(end.token_ids.size(), 400U);
  EXPECT_EQ(engine->pool()->used_blocks(), 0U);
  engine->Cancel(12345);  // unknown: nothing happens
}

TEST(EngineTest, AnIdleEngineStillKeepsDeadlines) {
  const auto engine = MakeEngine(SmallOptions(kTinyModel));
  Request held = GreedyRequest({1, 2}, 4);
  held.kind = RequestKind::kDecode;
  held.deadline = In(30);
  held.on_admitted = [](RequestNumber, const Admission&) {};
  const auto begin = std::chrono::steady_clock::now();
  const Answer answer = Finish(Start(*engine, std::move(held)));
  EXPECT_EQ(answer.outcome.status.code(), Code::kDeadlineExceeded);
  EXPECT_GE(std::chrono::steady_clock::now() - begin, std::chrono::milliseconds(29));
}

TEST(EngineTest, WaitingRequestsSeeBlocksThatOthersGiveBack) {
  EngineOptions options = SmallOptions(kTinyModel);
  options.kv_blocks = 4;
  const auto engine = MakeEngine(options);
  auto lease = engine->pool()->Allocate(3);  // somebody else's
  auto answer = Start(*engine, GreedyRequest({1, 2, 3}, 30));
  EXPECT_EQ(answer.wait_for(std::chrono::milliseconds(20)), std::future_status::timeout);
  lease->Reset();
  EXPECT_TRUE(Finish(std::move(answer)).outcome.status.ok());
}

TEST(EngineTest, StopEndsEverythingAndRefusesMore) {
  const auto engine = MakeEngine(SmallOptions(kTinyModel));
  std::vector<std::future<Answer>> answers;
  for (int i = 0; i < 5; ++i) answers.push_back(Start(*engine, GreedyRequest({1}, 300)));
  engine->Stop({Code::kDraining, "the daemon stops"});
  for (auto& answer : answers) {
    const Answer end = Finish(std::move(answer));
    if (!end.outcome.status.ok()) {
      EXPECT_EQ(end.outcome.status.code(), Code::kDraining);
    }
  }
  EXPECT_EQ(engine->Submit(GreedyRequest({1}, 1)).error().code(), Code::kDraining);
  EXPECT_EQ(engine->pool()->used_blocks(), 0U);
  engine->Stop({Code::kCancelled, "again"});
}

TEST(EngineTest, BadModelsAndFlagsAreRefused) {
  EngineOptions options = SmallOptions("tests/engine/data/no-such-model");
  EXPECT_EQ(Engine::Create(options).error().code(), Code::kNotFound);
  EXPECT_THAT(Engine::Create(options).error().message(), HasSubstr("no-such-model"));
  options = SmallOptions(kTinyModel);
  options.block_size = 0;
  EXPECT_THAT(Engine::Create(options).error().message(), HasSubstr("block_size = 0"));
  options = SmallOptions(kTinyModel);
  options.kv_layout = KvFormat::kMla;
  EXPECT_THAT(Engine::Create(options).error().message(), HasSubstr("mla"));
}

}  // namespace
}  // namespace kvrelay::engine
