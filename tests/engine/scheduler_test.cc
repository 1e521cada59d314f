#include "engine/scheduler.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cstring>
#include <random>

#include "kvcache/kv_view.h"
#include "tests/engine/scheduler_fixture.h"

namespace kvrelay::engine {
namespace {

using testing::HasSubstr;

TEST_F(SchedulerTest, LengthStopAndEosEndARequest) {
  Open(64);
  const RequestNumber whole = Add(Make({}, Ids(9, 1), 12));
  RunAll();
  const std::vector<uint32_t> answer = ids_[whole];
  ASSERT_EQ(answer.size(), 12U);
  EXPECT_EQ(outcomes_[whole].reason, FinishReason::kLength);
  EXPECT_TRUE(outcomes_[whole].status.ok());

  // A stop id that comes up ends it there and is part of the answer.
  Request stop = Make({}, Ids(9, 1), 12);
  stop.stop_ids = {answer[4]};
  const size_t first = std::find(answer.begin(), answer.end(), answer[4]) - answer.begin();
  const RequestNumber stopped = Add(std::move(stop));
  RunAll();
  EXPECT_EQ(ids_[stopped],
            std::vector<uint32_t>(answer.begin(), answer.begin() + static_cast<long>(first) + 1));
  EXPECT_EQ(outcomes_[stopped].reason, FinishReason::kStop);

  // The same through the model's eos ids, unless the request ignores them.
  scheduler_ = nullptr;
  Open(64, {.eos_ids = {answer[4]}});
  Request eos = Make({}, Ids(9, 1), 12);
  eos.ignore_eos = false;
  const RequestNumber ended = Add(eos);
  const RequestNumber ignoring = Add(Make({}, Ids(9, 1), 12));
  RunAll();
  EXPECT_EQ(ids_[ended].size(), first + 1);
  EXPECT_EQ(outcomes_[ended].reason, FinishReason::kStop);
  EXPECT_EQ(ids_[ignoring], answer);
}

TEST_F(SchedulerTest, SystemPromptsOfAnyLengthGiveTheSameAnswer) {
  const std::vector<uint32_t> prompt = Ids(23, 2);
  Open(64, {.prefill_chunk = 5});
  const RequestNumber plain = Add(Make({}, prompt, 8));
  RunAll();
  for (uint32_t system = 1; system <= prompt.size(); ++system) {
    const std::vector<uint32_t> head(prompt.begin(), prompt.begin() + system);
    const std::vector<uint32_t> tail(prompt.begin() + system, prompt.end());
    const RequestNumber first = Add(Make(head, tail, 8));
    RunAll();
    const RequestNumber second = Add(Make(head, tail, 8));
    RunAll();
    EXPECT_EQ(ids_[first], ids_[plain]) << system;
    EXPECT_EQ(ids_[second], ids_[plain]) << system;
    const uint32_t shared = std::min<uint32_t>(system, 22) / kBlock * kBlock;
    EXPECT_EQ(outcomes_[second].prefix_tokens, shared);
    EXPECT_EQ(outcomes_[second].prefix_hit, shared > 0);
  }
}

TEST_F(SchedulerTest, ASharedPromptIsComputedOnce) {
  Open(200, {.max_batch = 20});
  const std::vector<uint32_t> system = Ids(42, 3);  // 10 whole blocks
  std::vector<RequestNumber> numbers;
  for (uint32_t i = 0; i < 16; ++i) numbers.push_back(Add(Make(system, Ids(3, 100 + i), 6)));
  RunAll();
  // 40 shared tokens once, 2 + 3 more of each.
  EXPECT_EQ(scheduler_->counts().prompt_tokens, 40U + 16 * 5);
  for (const RequestNumber number : numbers) {
    EXPECT_TRUE(outcomes_[number].relay) << outcomes_[number].relay_why;
    EXPECT_THAT(outcomes_[number].relay_why, HasSubstr("shared by"));
  }
  EXPECT_EQ(prefixes_->size(), 1U);
  EXPECT_EQ(free(), 190U);
  // And each answer is that of a request that shares nothing.
  for (uint32_t i = 0; i < 16; i += 5) {
    std::vector<uint32_t> whole = system;
    const std::vector<uint32_t> own = Ids(3, 100 + i);
    whole.insert(whole.end(), own.begin(), own.end());
    const RequestNumber alone = Add(Make({}, whole, 6));
    RunAll();
    EXPECT_EQ(ids_[alone], ids_[numbers[i]]);
    EXPECT_EQ(outcomes_[alone].relay_why, "no prefix");
  }
}

TEST_F(SchedulerTest, CancellingTheFirstOfManyDoesNotStopThePrefix) {
  Open(200, {.prefill_chunk = 4});
  const std::vector<uint32_t> system = Ids(40, 3);
  const RequestNumber first = Add(Make(system, {1}, 4));
  const RequestNumber second = Add(Make(system, {2}, 4));
  scheduler_->Step();
  scheduler_->Step();
  scheduler_->End(first, {Code::kCancelled, "cancelled"});
  EXPECT_EQ(outcomes_[first].reason, FinishReason::kCancelled);
  RunAll();
  EXPECT_EQ(outcomes_[second].reason, FinishReason::kLength);
  EXPECT_EQ(scheduler_->counts().prompt_tokens, 41U);
}

TEST_F(SchedulerTest, APrefixThatNobodyWaitsForIsDropped) {
  Open(32, {.prefill_chunk = 4});
  const RequestNumber number = Add(Make(Ids(40, 3), {1}, 4));
  scheduler_->Step();
  EXPECT_EQ(free(), 32U - 10 - 1);
  scheduler_->End(number, {Code::kCancelled, "cancelled"});
  EXPECT_EQ(free(), 32U);
  EXPECT_EQ(prefixes_->size(), 0U);
}

TEST_F(SchedulerTest, AFullPoolMakesRequestsWaitInOrder) {
  Open(8);
  // 5 blocks each (8 prompt + 13 - 1 answer tokens): one at a time; the small one behind does not
  // overtake.
  const RequestNumber first = Add(Make({}, Ids(8, 1), 13));
  const RequestNumber second = Add(Make({}, Ids(8, 2), 13));
  const RequestNumber small = Add(Make({}, Ids(2, 3), 1));
  scheduler_->Step();
  EXPECT_EQ(scheduler_->counts().running, 1U);
  EXPECT_EQ(scheduler_->counts().queued, 2U);
  while (!outcomes_.contains(first)) ASSERT_TRUE(scheduler_->Step());
  EXPECT_TRUE(ids_[second].empty());
  RunAll();
  EXPECT_EQ(ids_[second].size(), 13U);
  EXPECT_EQ(ids_[small].size(), 1U);
  EXPECT_EQ(free(), 8U);
}

TEST_F(SchedulerTest, IdlePrefixesMakeRoomLeastRecentlyUsedFirst) {
  Open(20);
  for (uint32_t i = 0; i < 4; ++i) {
    Add(Make(Ids(16, i), {1}, 2));  // 4 blocks of prefix each
    RunAll();
  }
  EXPECT_EQ(prefixes_->size(), 4U);
  EXPECT_EQ(free(), 4U);
  const RequestNumber big = Add(Make({}, Ids(30, 9), 3));  // 8 blocks: one prefix must go
  RunAll();
  EXPECT_TRUE(outcomes_[big].status.ok());
  EXPECT_EQ(prefixes_->size(), 3U);
  const RequestNumber again = Add(Make(Ids(16, 1), {1}, 2));
  RunAll();
  EXPECT_TRUE(outcomes_[again].prefix_hit);
}

TEST_F(SchedulerTest, MaxBatchBoundsWhatRuns) {
  Open(100, {.max_batch = 3});
  for (uint32_t i = 0; i < 8; ++i) Add(Make({}, Ids(3, i), 5));
  size_t most = 0;
  while (scheduler_->Step()) most = std::max<size_t>(most, scheduler_->counts().running);
  EXPECT_EQ(most, 3U);
  EXPECT_EQ(outcomes_.size(), 8U);
}

TEST_F(SchedulerTest, ALongPromptDoesNotStopTheOthers) {
  Open(200, {.prefill_chunk = 8});
  const RequestNumber decoding = Add(Make({}, Ids(4, 1), 40));
  scheduler_->Step();
  const RequestNumber big = Add(Make({}, Ids(100, 2), 2));
  const size_t before = ids_[decoding].size();
  for (int i = 0; i < 10; ++i) scheduler_->Step();
  EXPECT_EQ(ids_[decoding].size(), before + 10);
  EXPECT_TRUE(ids_[big].empty());
  RunAll();
  EXPECT_EQ(ids_[big].size(), 2U);
}

TEST_F(SchedulerTest, DeadlinesHoldInTheQueueAndInTheBatch) {
  Open(100, {.max_batch = 1});
  Request running = Make({}, Ids(4, 1), 50);
  running.deadline = now_ + Millis(100);
  Request waiting = Make({}, Ids(4, 2), 50);
  waiting.deadline = now_ + Millis(50);
  const RequestNumber a = Add(running);
  const RequestNumber b = Add(waiting);
  scheduler_->Step();
  EXPECT_EQ(scheduler_->NextDeadline(), now_ + Millis(50));
  now_ += Millis(50);
  scheduler_->Step();
  EXPECT_EQ(outcomes_[b].status.code(), Code::kDeadlineExceeded);
  EXPECT_THAT(outcomes_[b].status.message(), HasSubstr("in the queue"));
  EXPECT_FALSE(outcomes_.contains(a));
  now_ += Millis(50);
  scheduler_->Step();
  EXPECT_EQ(outcomes_[a].status.code(), Code::kDeadlineExceeded);
  EXPECT_EQ(outcomes_[a].reason, FinishReason::kError);
  EXPECT_THAT(outcomes_[a].status.message(), HasSubstr("2 tokens generated"));
  EXPECT_EQ(free(), 100U);
}

TEST_F(SchedulerTest, EndAllEndsWaitingAndRunning) {
  Open(100, {.max_batch = 2});
  for (uint32_t i = 0; i < 5; ++i) Add(Make(Ids(9, 1), Ids(3, i), 5));
  scheduler_->Step();
  scheduler_->EndAll({Code::kDraining, "the daemon stops"});
  EXPECT_EQ(outcomes_.size(), 5U);
  for (const auto& [number, outcome] : outcomes_) {
    EXPECT_EQ(outcome.status.code(), Code::kDraining);
  }
  EXPECT_FALSE(scheduler_->Step());
}

// The whole life of a request that is prefilled by one scheduler and decoded by another, the pull
// played by the test.
TEST_F(SchedulerTest, APrefilledRequestIsDecodedElsewhere) {
  const std::vector<uint32_t> system = Ids(10, 5);
  const std::vector<uint32_t> own = Ids(7, 6);
  Open(64, {.prefill_chunk = 3}, 100, 2);
  const RequestNumber local = Add(Make(system, own, 9));
  RunAll();
  prefixes_->Clear();
  const uint64_t computed_before = scheduler_->counts().prompt_tokens;

  Request prefill = Make(system, own, 0);
  prefill.kind = RequestKind::kPrefill;
  const RequestNumber number = Add(prefill);
  EXPECT_FALSE(scheduler_->Step()) << "held requests do not run";
  const Admission& admission = admissions_.at(number);
  EXPECT_EQ(admission.prefix_tokens, 8U);
  EXPECT_FALSE(admission.prefix_cached);
  EXPECT_EQ(admission.prefix_blocks.size(), 2U);
  EXPECT_EQ(admission.blocks.size(), 3U);  // 9 tokens

  std::vector<std::vector<Progress>> told(2);
  scheduler_->Begin(
      number, {.progress = [&](uint32_t rank, const Progress& p) { told[rank].push_back(p); }});
  RunAll();
  EXPECT_EQ(outcomes_[number].reason, FinishReason::kLength);
  EXPECT_TRUE(ids_[number].empty());
  EXPECT_EQ(scheduler_->counts().prompt_tokens - computed_before, 17U);
  for (uint32_t rank = 0; rank < 2; ++rank) {
    EXPECT_THAT(told[rank], testing::Contains(Progress{8, 8, 0})) << "the shared prefix";
    EXPECT_THAT(told[rank], testing::Contains(Progress{8, 11, 1})) << "a layer behind it";
    EXPECT_EQ(told[rank].back(), (Progress{17, 17, 0}));
    EXPECT_TRUE(std::is_sorted(told[rank].begin(), told[rank].end(), [](auto a, auto b) {
      return a.Pack() < b.Pack();
    })) << "never back";
  }

  // "Pull": the decoding request gets the very same bytes into blocks of its own. Its prefix is in
  // the store already.
  Request decode = Make(system, own, 9);
  decode.kind = RequestKind::kDecode;
  const RequestNumber decoding = Add(decode);
  EXPECT_FALSE(scheduler_->Step());
  const Admission& room = admissions_.at(decoding);
  EXPECT_EQ(room.blocks.size(), 5U);  // 9 prompt and 8 answer tokens
  EXPECT_EQ(room.prefix_tokens, 8U);
  EXPECT_TRUE(room.prefix_blocks.empty());
  for (const KvRank& rank : runner_->ranks()) {
    const KvView view(rank.layout, {rank.region.data()});
    for (uint32_t layer = 0; layer < 2; ++layer) {
      for (uint32_t token = 0; token < 9; ++token) {
        const BlockId from = admission.blocks.blocks()[token / kBlock];
        const BlockId to = room.blocks.blocks()[token / kBlock];
        const size_t bytes = rank.layout.row_bytes();
        std::memcpy(view.K(layer, to, 0, token % kBlock), view.K(layer, from, 0, token % kBlock),
                    bytes);
        std::memcpy(view.V(layer, to, 0, token % kBlock), view.V(layer, from, 0, token % kBlock),
                    bytes);
      }
    }
  }
  const uint64_t computed = scheduler_->counts().prompt_tokens;
  scheduler_->Begin(decoding, {.prefix = prefixes_->Find(room.prefix_names.back())});
  RunAll();
  EXPECT_EQ(ids_[decoding], ids_[local]);
  EXPECT_EQ(scheduler_->counts().prompt_tokens - computed, 1U) << "only the last token runs again";
}

TEST_F(SchedulerTest, AHeldRequestHearsWhatIsDoneAlready) {
  Open(64, {}, 100, 2);
  const std::vector<uint32_t> system = Ids(8, 5);
  Add(Make(system, {1}, 2));
  RunAll();
  Request prefill = Make(system, {2}, 0);
  prefill.kind = RequestKind::kPrefill;
  const RequestNumber number = Add(prefill);
  scheduler_->Step();
  EXPECT_TRUE(admissions_.at(number).prefix_cached);
  std::vector<Progress> seen[2];  // each rank's thread tells its own
  scheduler_->Begin(
      number, {.progress = [&](uint32_t rank, const Progress& p) { seen[rank].push_back(p); }});
  for (const auto& of_rank : seen) EXPECT_THAT(of_rank, testing::ElementsAre(Progress{8, 8, 0}));
  RunAll();
  for (const auto& of_rank : seen) {
    EXPECT_EQ(of_rank.back(), (Progress{9, 9, 0})) << "and of what is behind it";
  }
}

TEST_F(SchedulerTest, BlocksOfAHeldRequestOutliveItWhileSomebodyWritesThem) {
  Open(8);
  Request decode = Make({}, Ids(8, 1), 5);
  decode.kind = RequestKind::kDecode;
  decode.deadline = now_ + Millis(10);
  const RequestNumber number = Add(decode);
  scheduler_->Step();
  EXPECT_EQ(free(), 5U);
  now_ += Millis(10);
  scheduler_->Step();
  EXPECT_EQ(outcomes_[number].status.code(), Code::kDeadlineExceeded);
  EXPECT_THAT(outcomes_[number].status.message(), HasSubstr("waiting for its KV"));
  EXPECT_EQ(free(), 5U) << "the pull still has them";
  admissions_.clear();
  EXPECT_EQ(free(), 8U);
  scheduler_->Begin(number, {});  // comes too late: nothing happens
  EXPECT_FALSE(scheduler_->Step());
}

TEST_F(SchedulerTest, DecodeAdmissionLeavesRoomForThePrefixToCome) {
  Open(12);
  Request decode = Make(Ids(24, 1), {1}, 8);  // 6 blocks of prefix, 2 of its own
  decode.kind = RequestKind::kDecode;
  const RequestNumber first = Add(decode);
  const RequestNumber same = Add(decode);  // waits for the same prefix: 2 more
  decode.system_ids = Ids(24, 2);
  const RequestNumber other = Add(decode);  // would need 8 more
  scheduler_->Step();
  EXPECT_TRUE(admissions_.contains(first));
  EXPECT_TRUE(admissions_.contains(same));
  EXPECT_FALSE(admissions_.contains(other));
  EXPECT_EQ(free(), 8U);
  scheduler_->EndAll({Code::kCancelled, "over"});
}

TEST_F(SchedulerTest, AWrongPrefixIsAnError) {
  Open(32);
  Request decode = Make(Ids(8, 1), {1}, 4);
  decode.kind = RequestKind::kDecode;
  const RequestNumber number = Add(decode);
  scheduler_->Step();
  scheduler_->Begin(number, {});
  EXPECT_EQ(outcomes_[number].status.code(), Code::kInternal);
}

TEST_F(SchedulerTest, RandomTrafficEndsAndLeaksNothing) {
  std::mt19937_64 random(TestSeed());
  Open(40, {.max_batch = 6, .prefill_chunk = 7, .auto_prefix_tokens = 4}, 3);
  std::vector<RequestNumber> numbers;
  on_token_ = [&](RequestNumber) { now_ += std::chrono::microseconds(300); };
  for (int step = 0; step < 600; ++step) {
    if (random() % 3 == 0 && numbers.size() < 120) {
      Request request = Make(Ids(random() % 24, static_cast<uint32_t>(random() % 5)),
                             Ids(1 + random() % 9, static_cast<uint32_t>(random())),
                             1 + static_cast<uint32_t>(random() % 12));
      if (random() % 4 == 0) request.deadline = now_ + Millis(static_cast<int64_t>(random() % 20));
      request.sampling = {static_cast<double>(random() % 2), 0.9, random()};
      numbers.push_back(Add(std::move(request)));
    }
    if (random() % 20 == 0 && !numbers.empty()) {
      scheduler_->End(numbers[random() % numbers.size()], {Code::kCancelled, "cancelled"});
    }
    scheduler_->Step();
  }
  RunAll();
  EXPECT_EQ(outcomes_.size(), numbers.size());
  const SchedulerCounts counts = scheduler_->counts();
  EXPECT_EQ(counts.finished_ok + counts.cancelled + counts.failed, numbers.size());
  EXPECT_EQ(counts.running + counts.queued, 0U);
}

TEST(CheckRequestTest, RefusesWithBothNumbers) {
  const RequestLimits limits{.vocab_size = 96,
                             .max_position = 100,
                             .max_prompt_tokens = 50,
                             .block_size = 4,
                             .num_blocks = 10};
  const auto check = [&](uint32_t system, uint32_t own, uint32_t max_new) {
    Request request = GreedyRequest(std::vector<uint32_t>(own, 1), max_new);
    request.system_ids.assign(system, 1);
    return CheckRequest(request, limits);
  };
  EXPECT_TRUE(check(10, 10, 21).ok());
  EXPECT_EQ(check(0, 0, 1).code(), Code::kInvalidArgument);
  EXPECT_EQ(check(0, 1, 0).code(), Code::kInvalidArgument);
  EXPECT_EQ(check(0, 51, 1).code(), Code::kTooLarge);
  EXPECT_THAT(check(0, 51, 1).message(), testing::AllOf(HasSubstr("51"), HasSubstr("50")));
  EXPECT_EQ(check(0, 50, 51).code(), Code::kTooLarge);
  EXPECT_THAT(check(0, 50, 51).message(), HasSubstr("100"));
  EXPECT_EQ(check(0, 20, 22).code(), Code::kTooLarge);  // 41 tokens, 11 blocks
  EXPECT_THAT(check(0, 20, 22).message(), testing::AllOf(HasSubstr("11"), HasSubstr("10")));
  EXPECT_TRUE(check(0, 20, 21).ok());
  Request alien = GreedyRequest({1, 96}, 1);
  EXPECT_EQ(CheckRequest(alien, limits).code(), Code::kInvalidArgument);
  EXPECT_THAT(CheckRequest(alien, limits).message(),
              testing::AllOf(HasSubstr("96"), HasSubstr("vocabulary")));
}

TEST(CheckRequestTest, TheLastPromptTokenIsNeverShared) {
  EXPECT_EQ(SharedTokens(8, 9, 4), 8U);
  EXPECT_EQ(SharedTokens(8, 8, 4), 4U);
  EXPECT_EQ(SharedTokens(7, 20, 4), 4U);
  EXPECT_EQ(SharedTokens(3, 20, 4), 0U);
  EXPECT_EQ(SharedTokens(0, 0, 4), 0U);
}

}  // namespace
}  // namespace kvrelay::engine
