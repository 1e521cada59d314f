// Prompts that begin alike share as much without saying so.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cstdint>
#include <random>
#include <vector>

#include "tests/engine/scheduler_fixture.h"

namespace kvrelay::engine {
namespace {

using testing::HasSubstr;
using Ids32 = std::vector<uint32_t>;

class SchedulerPrefixes : public SchedulerTest {
 protected:
  static Ids32 Join(Ids32 a, const Ids32& b) {
    a.insert(a.end(), b.begin(), b.end());
    return a;
  }
  // Its answer when nobody else is there and nothing is shared.
  Ids32 Alone(const Ids32& prompt, uint32_t max_new) {
    Open(64);
    const RequestNumber number = Add(Make({}, prompt, max_new));
    RunAll();
    return ids_[number];
  }
};

TEST_F(SchedulerPrefixes, ABurstOfPromptsThatBeginAlikeComputesTheStartOnce) {
  const Ids32 start = Ids(42, 3);  // 10 whole blocks
  std::vector<Ids32> alone;
  for (uint32_t i = 0; i < 16; ++i) alone.push_back(Alone(Join(start, Ids(3, 100 + i)), 6));
  Open(200, {.max_batch = 20, .auto_prefix_tokens = 8});
  std::vector<RequestNumber> numbers;
  for (uint32_t i = 0; i < 16; ++i) {
    numbers.push_back(Add(Make({}, Join(start, Ids(3, 100 + i)), 6)));
  }
  RunAll();
  EXPECT_EQ(scheduler_->counts().prompt_tokens, 40U + 16 * 5);
  EXPECT_EQ(scheduler_->counts().prefixes_found, 16U);
  for (uint32_t i = 0; i < 16; ++i) {
    EXPECT_EQ(ids_[numbers[i]], alone[i]);
    EXPECT_EQ(outcomes_[numbers[i]].prefix_tokens, 40U);
    EXPECT_TRUE(outcomes_[numbers[i]].relay) << outcomes_[numbers[i]].relay_why;
  }
}

TEST_F(SchedulerPrefixes, WhatARunningRequestHasIsSharedWithTheNext) {
  const Ids32 start = Ids(42, 3);
  const Ids32 first_prompt = Join(start, {1, 2, 3});
  const Ids32 second_prompt = Join(start, {4, 5});
  const Ids32 first_alone = Alone(first_prompt, 20);
  const Ids32 second_alone = Alone(second_prompt, 4);
  Open(64, {.auto_prefix_tokens = 8});
  const RequestNumber first = Add(Make({}, first_prompt, 20));
  for (int step = 0; step < 3; ++step) scheduler_->Step();
  const uint64_t computed = scheduler_->counts().prompt_tokens;
  const uint32_t free_before = free();
  const RequestNumber second = Add(Make({}, second_prompt, 4));
  scheduler_->Step();
  EXPECT_EQ(scheduler_->counts().prompt_tokens - computed, 4U) << "the start is not run again";
  EXPECT_EQ(free_before - free(), 2U) << "nor held twice";
  EXPECT_EQ(scheduler_->counts().prefixes_promoted, 1U);
  RunAll();
  EXPECT_EQ(ids_[first], first_alone);
  EXPECT_EQ(ids_[second], second_alone);
  EXPECT_TRUE(outcomes_[second].prefix_hit);
  for (const RequestNumber number : {first, second}) {
    EXPECT_EQ(outcomes_[number].relay_why, "prefix shared by 2");
  }
}

TEST_F(SchedulerPrefixes, SmallerGroupsShareMore) {
  const Ids32 system = Ids(24, 3);
  const Ids32 tool = Join(system, Ids(16, 4));
  const Ids32 other_tool = Join(system, Ids(16, 5));
  const std::vector<Ids32> prompts = {Join(tool, {1}), Join(other_tool, {2, 3}), Join(tool, {4, 5}),
                                      Join(other_tool, {6}), Join(system, {7, 8, 9})};
  std::vector<Ids32> alone;
  for (const Ids32& prompt : prompts) alone.push_back(Alone(prompt, 8));
  Open(64, {.prefill_chunk = 7, .auto_prefix_tokens = 8});
  std::vector<RequestNumber> numbers;
  for (const Ids32& prompt : prompts) numbers.push_back(Add(Make({}, prompt, 8)));
  RunAll();
  EXPECT_EQ(scheduler_->counts().prompt_tokens, 24U + 16 + 16 + 1 + 2 + 2 + 1 + 3);
  for (size_t i = 0; i < prompts.size(); ++i) {
    EXPECT_EQ(ids_[numbers[i]], alone[i]) << i;
    EXPECT_EQ(outcomes_[numbers[i]].prefix_tokens, i == 4 ? 24U : 40U);
    EXPECT_THAT(outcomes_[numbers[i]].relay_why, HasSubstr("shared by"));
  }
  EXPECT_EQ(prefixes_->size(), 3U);
  EXPECT_EQ(prefixes_->idle_blocks(), 6U + 4 + 4) << "each block once";
}

TEST_F(SchedulerPrefixes, WhoComputesAStartMayLeave) {
  const Ids32 system = Ids(40, 3);
  const Ids32 prompt = Join(Join(system, Ids(8, 4)), {1});
  const Ids32 alone = Alone(prompt, 4);
  Open(64, {.prefill_chunk = 4, .auto_prefix_tokens = 8});
  // The second's start is the first one's system prompt.
  const RequestNumber first = Add(Make(system, {1}, 4));
  const RequestNumber second = Add(Make(Ids32(prompt.begin(), prompt.begin() + 48), {1}, 4));
  for (int step = 0; step < 3; ++step) scheduler_->Step();
  scheduler_->End(first, {Code::kCancelled, "cancelled"});
  RunAll();
  EXPECT_EQ(ids_[second], alone);
  EXPECT_EQ(scheduler_->counts().prompt_tokens, 49U) << "what was done is not done again";
}

TEST_F(SchedulerPrefixes, SharedBlocksGoWhenNobodyHasThemAndOthersNeedThem) {
  const Ids32 start = Ids(40, 3);
  Open(16, {.auto_prefix_tokens = 8});
  const RequestNumber first = Add(Make({}, Join(start, {1}), 4));
  scheduler_->Step();
  const RequestNumber second = Add(Make({}, Join(start, {2}), 4));
  const RequestNumber large = Add(Make({}, Ids(52, 9), 2));  // 14 blocks
  scheduler_->Step();
  EXPECT_TRUE(ids_.contains(second));
  EXPECT_FALSE(ids_.contains(large)) << "what two requests read is not evicted";
  EXPECT_EQ(prefixes_->size(), 1U);
  RunAll();
  EXPECT_TRUE(outcomes_[first].status.ok());
  EXPECT_TRUE(outcomes_[large].status.ok());
  EXPECT_EQ(prefixes_->size(), 0U);
}

TEST_F(SchedulerPrefixes, AHeldRequestSharesWhatIsHereAndWaitsForNoMore) {
  const Ids32 start = Ids(24, 3);
  Open(64, {.auto_prefix_tokens = 8});
  Add(Make({}, Join(start, {1}), 30));
  for (int step = 0; step < 2; ++step) scheduler_->Step();
  Request decode = Make({}, Join(start, {2, 3}), 4);
  decode.kind = RequestKind::kDecode;
  const RequestNumber number = Add(decode);
  scheduler_->Step();
  const Admission& room = admissions_.at(number);
  EXPECT_EQ(room.prefix_tokens, 24U);
  ASSERT_EQ(room.prefix_names.size(), 6U);
  EXPECT_EQ(room.held_tokens, 24U);
  EXPECT_EQ(room.blocks.size(), 2U);
  EXPECT_NE(prefixes_->Find(room.prefix_names.back()), nullptr) << "nobody has to bring it";
  scheduler_->EndAll({Code::kCancelled, "over"});
}

TEST_F(SchedulerPrefixes, WhatWasConvertedOnItsWayStaysMarked) {
  const Ids32 start = Ids(24, 3);
  Open(64, {.auto_prefix_tokens = 8});
  Request decode = Make({}, Join(start, {1}), 30);
  decode.kind = RequestKind::kDecode;
  const RequestNumber first = Add(decode);
  scheduler_->Step();
  scheduler_->Begin(first, {.cast = true});
  Add(Make({}, Join(start, {2}), 2));
  scheduler_->Step();
  EXPECT_EQ(prefixes_->size(), 1U);
  const auto names = admissions_.at(first).prefix_names;
  EXPECT_TRUE(names.empty()) << "it shared nothing when it came";
  const auto [hash, tokens, references, hits] = prefixes_->List().front();
  EXPECT_TRUE(prefixes_->Find(hash)->cast);
  scheduler_->EndAll({Code::kCancelled, "over"});
}

TEST_F(SchedulerPrefixes, FewerEqualTokensThanAskedForAreNotShared) {
  Open(64, {.auto_prefix_tokens = 17});
  for (uint32_t i = 0; i < 4; ++i) Add(Make({}, Join(Ids(16, 3), {1 + i}), 4));
  RunAll();
  EXPECT_EQ(prefixes_->size(), 0U);
  EXPECT_EQ(scheduler_->counts().prompt_tokens, 4U * 17);
}

// Prompts out of a small tree of starts come and go; each answer is that of the prompt alone.
TEST_F(SchedulerPrefixes, RandomTreesGiveTheSameAnswers) {
  std::mt19937_64 random(TestSeed());
  std::vector<Ids32> prompts;
  for (int i = 0; i < 12; ++i) {
    Ids32 prompt;
    for (uint32_t level = 0; level <= random() % 3; ++level) {
      prompt = Join(prompt, Ids(11, 7 * level + static_cast<uint32_t>(random() % 2)));
    }
    prompts.push_back(Join(prompt, Ids(1 + random() % 4, static_cast<uint32_t>(random()))));
  }
  std::vector<Ids32> alone;
  for (const Ids32& prompt : prompts) alone.push_back(Alone(prompt, 6));
  Open(40, {.max_batch = 6, .prefill_chunk = 7, .auto_prefix_tokens = 4}, 3);
  std::map<RequestNumber, size_t> asked;
  for (int step = 0; step < 400; ++step) {
    if (random() % 3 == 0) {
      const size_t which = random() % prompts.size();
      const Ids32& prompt = prompts[which];
      const auto system =
          prompt.begin() + static_cast<ptrdiff_t>(random() % 2 == 0 ? 0 : random() % prompt.size());
      asked[Add(Make({prompt.begin(), system}, {system, prompt.end()}, 6))] = which;
    }
    if (random() % 20 == 0 && !asked.empty()) {
      const RequestNumber any = 1 + random() % last_number_;
      scheduler_->End(any, {Code::kCancelled, "cancelled"});
    }
    scheduler_->Step();
  }
  RunAll();
  for (const auto& [number, which] : asked) {
    if (outcomes_[number].status.ok()) {
      EXPECT_EQ(ids_[number], alone[which]);
    }
  }
  EXPECT_EQ(scheduler_->counts().running + scheduler_->counts().queued, 0U);
}

}  // namespace
}  // namespace kvrelay::engine
