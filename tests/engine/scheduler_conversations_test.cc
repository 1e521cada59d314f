// What the scheduler keeps of conversations, and what their next turns make of it.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cstdint>
#include <vector>

#include "tests/engine/scheduler_fixture.h"

namespace kvrelay::engine {
namespace {

class SchedulerConversations : public SchedulerTest {
 protected:
  // Runs a kDecode request, whose KV comes at once, to its end; its conversation is to be kept.
  RequestNumber Answer(const Request& turn) {
    const RequestNumber number = Add(turn);
    scheduler_->Step();
    admissions_.clear();
    scheduler_->Begin(number, {.keep = true});
    RunAll();
    return number;
  }
};

TEST_F(SchedulerConversations, TheNextTurnHoldsTheWholeBlocksOfTheLast) {
  max_kept_blocks_ = 20;
  Open(20);
  Request turn = Make({}, Ids(9, 1), 6);
  turn.kind = RequestKind::kDecode;
  const RequestNumber first = Add(turn);
  scheduler_->Step();
  EXPECT_EQ(admissions_.at(first).kept.conversation, nullptr);
  const auto blocks = admissions_.at(first).blocks.Share();
  admissions_.clear();
  scheduler_->Begin(first, {.keep = true, .compute_ms = 3, .computed_tokens = 9});
  RunAll();
  EXPECT_EQ(free(), 16U) << "14 tokens: 9, and of the answer all but the last";

  turn.token_ids.insert(turn.token_ids.end(), ids_[first].begin(), ids_[first].end());
  turn.token_ids.insert(turn.token_ids.end(), {1, 2, 3});
  const RequestNumber second = Add(turn);
  scheduler_->Step();
  const Admission& room = admissions_.at(second);
  EXPECT_EQ(room.kept.tokens, 14U);
  EXPECT_EQ(room.kept.conversation->compute_ms, 3);
  EXPECT_EQ(room.held_tokens, 12U);
  ASSERT_EQ(room.blocks.size(), 6U);  // 18 prompt and 5 answer tokens
  EXPECT_TRUE(std::ranges::equal(room.blocks.blocks().first(3), blocks.blocks().first(3)));
  EXPECT_NE(room.blocks.blocks()[3], blocks.blocks()[3]) << "the block with the end is not shared";
  scheduler_->EndAll({Code::kCancelled, "over"});
}

TEST_F(SchedulerConversations, OnlyWhatWasAskedForAndEndedWellIsKept) {
  max_kept_blocks_ = 20;
  Open(20);
  Request turn = Make({}, Ids(9, 1), 6);
  turn.kind = RequestKind::kDecode;
  for (const bool keep : {false, true}) {
    const RequestNumber number = Add(turn);
    scheduler_->Step();
    admissions_.clear();
    scheduler_->Begin(number, {.keep = keep});
    scheduler_->Step();
    if (keep) scheduler_->End(number, {Code::kCancelled, "the client left"});
    RunAll();
    EXPECT_EQ(free(), 20U);
  }
}

TEST_F(SchedulerConversations, KeptConversationsGoWhenBlocksRunShortOrTheirTimeIsOver) {
  max_kept_blocks_ = 20;
  Open(20);
  const auto answer = [this](uint32_t seed) {
    Request turn = Make({}, Ids(16, seed), 5);
    turn.kind = RequestKind::kDecode;
    Answer(turn);
  };
  for (uint32_t seed = 1; seed <= 3; ++seed) answer(seed);
  EXPECT_EQ(free(), 5U);
  const RequestNumber large = Add(Make({}, Ids(30, 9), 5));  // 9 blocks
  RunAll();
  EXPECT_TRUE(outcomes_[large].status.ok());
  EXPECT_EQ(conversations_->info().conversations, 2U) << "no more went than had to";
  EXPECT_EQ(scheduler_->NextDeadline(), now_ + Millis(1000));
  now_ += Millis(1000);
  EXPECT_FALSE(scheduler_->Step());
  EXPECT_EQ(free(), 20U);
  EXPECT_EQ(scheduler_->NextDeadline(), TimePoint::max());
}

TEST_F(SchedulerConversations, ARequestThatFillsThePoolIsNotKeptOutByItsOwnLastTurn) {
  max_kept_blocks_ = 8;
  Open(8);
  Request turn = Make({}, Ids(13, 1), 5);
  turn.kind = RequestKind::kDecode;
  const RequestNumber first = Answer(turn);
  EXPECT_EQ(free(), 3U);
  turn.token_ids.insert(turn.token_ids.end(), ids_[first].begin(), ids_[first].end());
  turn.max_new_tokens = 14;
  const RequestNumber second = Add(turn);  // 18 + 13 tokens: all 8 blocks
  for (int step = 0; step < 3; ++step) scheduler_->Step();
  EXPECT_TRUE(admissions_.contains(second));
  scheduler_->EndAll({Code::kCancelled, "over"});
}

TEST_F(SchedulerConversations, APromptWhoseStartWasBroughtComputesTheRest) {
  Open(64, {}, 100, 2);
  const std::vector<uint32_t> system = Ids(8, 5);
  const std::vector<uint32_t> own = Ids(21, 6);
  Request prefill = Make(system, own, 0);
  prefill.kind = RequestKind::kPrefill;
  prefill.reuse_tokens = 27;
  for (const bool prefix_is_here : {false, true}) {
    if (prefix_is_here) {
      Add(Make(system, {1}, 2));
      RunAll();
    }
    const RequestNumber number = Add(prefill);
    scheduler_->Step();
    EXPECT_EQ(admissions_.at(number).prefix_tokens, prefix_is_here ? 8U : 0U)
        << "nobody else waits for a prefix that comes from elsewhere";
    EXPECT_EQ(admissions_.at(number).blocks.size(), prefix_is_here ? 6U : 8U);
    const uint64_t computed = scheduler_->counts().prompt_tokens;
    std::vector<Progress> seen[2];  // each rank's thread tells its own
    scheduler_->Begin(
        number, {.reused_tokens = 27,
                 .progress = [&](uint32_t rank, const Progress& p) { seen[rank].push_back(p); }});
    for (const auto& of_rank : seen)
      EXPECT_THAT(of_rank, testing::ElementsAre(Progress{27, 27, 0}));
    RunAll();
    for (const auto& of_rank : seen) EXPECT_EQ(of_rank.back(), (Progress{29, 29, 0}));
    EXPECT_EQ(scheduler_->counts().prompt_tokens - computed, 2U);
    EXPECT_EQ(outcomes_[number].computed_tokens, 2U);
  }
  // It did not come: all is computed, with what the engine has of it.
  const RequestNumber alone = Add(prefill);
  scheduler_->Step();
  scheduler_->Begin(alone, {});
  RunAll();
  EXPECT_EQ(outcomes_[alone].computed_tokens, 21U);
}

}  // namespace
}  // namespace kvrelay::engine
