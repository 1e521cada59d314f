// The turns of a conversation: from the second one on the prefill daemon takes the KV that it lacks
// from the decode daemon, computes the new tokens only, and the decode daemon pulls only what it
// has not kept.
#include <gmock/gmock.h>

#include "tests/integration/reuse_story.h"

namespace kvrelay::integration {
namespace {

using ::testing::HasSubstr;

class Reuse : public ReuseStory {
 protected:
  // Three turns: all of the earlier ones' KV is taken back, and no byte more moves than has to.
  // `cached`: tokens of the system prompt that the prefill daemon has in its own blocks.
  void CheckThreeTurns(Talk talk, uint32_t decode_block, uint32_t cached) {
    const uint64_t computed_before = Count(*prefill, "kvrelay_prompt_tokens_computed_total");
    const Json first = Ask(talk, 1);
    EXPECT_EQ(first["kv"]["reused_tokens"], 0);
    uint64_t computed = first["kv"]["computed_tokens"].get<uint64_t>();
    size_t known = talk.tokens() - 11 - 1;  // the answer's last token was never run
    for (size_t turn = 2; turn <= 3; ++turn) {
      const size_t tokens = talk.tokens();
      const Json summary = Ask(talk, turn);
      const Json kv = summary["kv"];
      EXPECT_EQ(kv["reused_tokens"], known - cached);
      EXPECT_EQ(kv["reuse_bytes"], (known - cached) * kTokenBytes);
      EXPECT_EQ(kv["computed_tokens"], tokens - known) << "the new ones only";
      EXPECT_EQ(kv["bytes_pulled"], (tokens - known / decode_block * decode_block) * kTokenBytes)
          << "the whole blocks are there still";
      EXPECT_GT(summary["timing_ms"]["reuse"], 0);
      computed += kv["computed_tokens"].get<uint64_t>();
      known = talk.tokens() - 11 - 1;
    }
    EXPECT_EQ(Count(*prefill, "kvrelay_prompt_tokens_computed_total") - computed_before, computed);
    EXPECT_EQ(Count(*prefill, "kvrelay_reuse_total{outcome=\"ok\"}"), 2);
    EXPECT_EQ(Count(*decode, "kvrelay_conversations"), 1) << "a turn replaces the one before";
    ExpectNothingLeft();
  }
};

TEST_F(Reuse, ThreeTurnsComputeOnlyWhatIsNew) {
  Begin();
  CheckThreeTurns({}, 16, 0);
}

TEST_F(Reuse, ASystemPromptThatBothHaveStaysWhereItIs) {
  Begin();
  CheckThreeTurns({.system = Text(77, 9)}, 16, 64);
}

TEST_F(Reuse, RanksBlocksAndLayoutsDiffer) {
  Begin({"--tp=2", "--kv_layout=hnd", "--block_size=16"}, {"--block_size=8"});
  CheckThreeTurns({}, 8, 0);
}

TEST_F(Reuse, StagesAndLargerBlocksOverAStream) {
  Begin({"--pp=2", "--block_size=8", "--transport=ucx-packed"},
        {"--tp=2", "--block_size=32", "--transport=ucx-packed"});
  CheckThreeTurns({.system = Text(77, 9)}, 32, 72);
}

TEST_F(Reuse, WithoutTheFlagEachTurnComputesAll) {
  prefill = &StartPrefill();
  decode = &StartDecode({prefill});
  Talk talk;
  for (size_t turn = 1; turn <= 3; ++turn) {
    const Talk before = talk;
    const Json summary = Ask(talk, turn);
    ExpectComputesAll(summary, before);
    EXPECT_EQ(summary["kv"]["bytes_pulled"], before.tokens() * kTokenBytes);
  }
  EXPECT_EQ(Kept(), 0);
  ExpectNothingLeft();
}

TEST_F(Reuse, APrefillDaemonWithoutTheFlagDialsNobody) {
  prefill = &StartPrefill();
  decode = &StartDecode({prefill}, {"--reuse_from_decode"});
  Talk talk;
  Ask(talk, 1);
  const Talk before = talk;
  const Json summary = Ask(talk, 2);
  ExpectComputesAll(summary, before);
  EXPECT_EQ(summary["kv"]["bytes_pulled"], (before.tokens() - 112) * kTokenBytes)
      << "what the decode daemon has it need not pull";
  EXPECT_EQ(Count(*prefill, "kvrelay_reuse_total{outcome=\"kRefused\"}"), 1);
  EXPECT_EQ(Count(*decode, "kvrelay_claims_total{outcome=\"ok\"}"), 0);
  ExpectNothingLeft();
}

TEST_F(Reuse, AnotherHistoryReusesTheCommonStart) {
  Begin();
  Talk talk;
  Ask(talk, 1);
  Talk other{.system = {}, .history = Text(100, 3)};
  other.history[50] ^= 1;
  const Json summary = Ask(other, 2);
  EXPECT_EQ(summary["kv"]["reused_tokens"], 50);
  EXPECT_EQ(summary["kv"]["computed_tokens"], 50);
  Talk third{.system = {}, .history = Text(100, 4)};
  third.history[0] = talk.history[0] ^ 1;
  const Talk before = third;
  ExpectComputesAll(Ask(third, 3), before);
  EXPECT_EQ(Count(*decode, "kvrelay_conversations"), 3);
  ExpectNothingLeft();
}

TEST_F(Reuse, AnotherPrefillDaemonTakesTheSystemPromptToo) {
  Begin();
  Daemon& second = StartPrefill({"--reuse_from_decode"});
  decode = &StartDecode({prefill, &second}, {"--reuse_from_decode"});
  Talk talk{.system = Text(77, 9)};
  const Json first = Ask(talk, 1);
  const size_t known = talk.tokens() - 11 - 1;
  const Json next = Ask(talk, 2);
  EXPECT_NE(next["prefill"], first["prefill"]);
  EXPECT_EQ(next["kv"]["reused_tokens"], known);
  ExpectNothingLeft();
  ExpectIdle(second);
}

TEST_F(Reuse, OthersTakeTheRoomOfAConversation) {
  Begin({}, {"--kv_blocks=24"});
  Talk talk;
  Ask(talk, 1);
  EXPECT_EQ(Kept(), 8U) << "123 tokens";
  Talk large{.system = {}, .history = Text(300, 5)};
  Ask(large, 2);
  EXPECT_EQ(Count(*decode, "kvrelay_conversations_ended_total{reason=\"evicted\"}"), 1);
  const Talk before = talk;
  ExpectComputesAll(Ask(talk, 3), before);
  ExpectNothingLeft();
}

TEST_F(Reuse, AConversationIsKeptWithinItsBoundsOnly) {
  Begin({}, {"--conversation_blocks=9", "--conversation_ttl_ms=200"});
  Talk talk;
  Ask(talk, 1);
  Eventually("its time is over", [&] {
    return Count(*decode, "kvrelay_conversations_ended_total{reason=\"ttl\"}") == 1;
  });
  EXPECT_EQ(Kept(), 0U);
  const Talk before = talk;
  ExpectComputesAll(Ask(talk, 2), before);
  EXPECT_EQ(Kept(), 0U) << "158 tokens are 10 blocks";
  ExpectNothingLeft();
}

// A value is rounded at most once between its computation and its use.
TEST_F(Reuse, ValuesThatWereCastAreNotTakenBack) {
  Begin({"--kv_dtype=fp32"}, {"--kv_dtype=fp16"});
  Talk talk;
  for (size_t turn = 1; turn <= 2; ++turn) {
    const auto reply = integration::Ask(decode->endpoint(), talk.Turn());
    ASSERT_TRUE(reply.has_value()) << reply.error().ToString();
    ExpectComputesAll(reply->summary, talk);
    talk.Continue(reply->token_ids, turn);
  }
  EXPECT_EQ(Kept(), 0U);
  ExpectNothingLeft();
}

TEST_F(Reuse, APrefillDaemonOfAnotherTypeComputesAll) {
  Begin({"--kv_dtype=fp32"});
  Daemon& other = StartPrefill({"--kv_dtype=fp16", "--reuse_from_decode"});
  decode = &StartDecode({prefill, &other}, {"--kv_dtype=fp32", "--reuse_from_decode"});
  Talk talk;
  EXPECT_EQ(Ask(talk, 1)["prefill"], prefill->endpoint());
  EXPECT_GT(Kept(), 0U);
  const auto reply = integration::Ask(decode->endpoint(), talk.Turn());
  ASSERT_TRUE(reply.has_value()) << reply.error().ToString();
  EXPECT_EQ(reply->summary["prefill"], other.endpoint());
  ExpectComputesAll(reply->summary, talk);
  EXPECT_EQ(Count(other, "kvrelay_reuse_total{outcome=\"kIncompatible\"}"), 1);
  EXPECT_THAT(other.log(), HasSubstr("it is fp32, this cache is fp16"));
  ExpectNothingLeft();
  ExpectIdle(other);
}

}  // namespace
}  // namespace kvrelay::integration
