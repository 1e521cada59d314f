// KV that is on its way back to the prefill daemon, and does not arrive.
#include <gmock/gmock.h>

#include <future>
#include <string>

#include "kvcache/kv_view.h"
#include "tests/integration/reuse_story.h"

namespace kvrelay::integration {
namespace {

using ::testing::HasSubstr;

// The decode daemon sends slowly what the prefill daemon takes back.
class ReuseMidPull : public ReuseStory {
 protected:
  static constexpr uint64_t kBytesPerS = 500'000;

  // Of a conversation that takes some seconds to send.
  static Talk LongTalk() { return {.system = {}, .history = Text(400, 3)}; }
  void BeginSlowly(Args prefill_flags = {}) {
    prefill_flags.emplace_back("--transport=ucx-packed");
    Begin(std::move(prefill_flags),
          {"--transport=ucx-packed", "--max_bytes_per_s=" + std::to_string(kBytesPerS)});
  }
  static LeaseId LeaseOf(const Json& lease) {
    const auto hex = lease["id"].get<std::string>();
    LeaseId id;
    EXPECT_EQ(hex.size(), 2 * id.bytes.size());
    for (size_t i = 0; i < id.bytes.size(); ++i) {
      id.bytes[i] = static_cast<uint8_t>(std::stoul(hex.substr(2 * i, 2), nullptr, 16));
    }
    return id;
  }
  // Of all the ticket's tokens, on the prefill daemon's only rank.
  std::vector<std::byte> KvOf(const proto::Ticket& ticket) {
    DirectReader reader(prefill->endpoint());
    const auto claim = reader.Claim(ticket);
    if (!claim.has_value()) return {};
    const auto meta = reader.GetMeta(claim->ranks[0]);
    if (!meta.has_value()) return {};
    DirectMapping mapping(*meta, run_dir());
    EXPECT_TRUE(mapping.Read(*claim, claim->ranks[0]).status.ok());
    EXPECT_TRUE(reader.Release(ticket).ok());
    std::vector<std::byte> memory = mapping.memory();
    const KvView view(meta->layout, {memory.data()});
    const uint32_t size = meta->layout.block_size;
    const uint64_t row = meta->layout.row_bytes();
    std::vector<std::byte> kv;
    for (uint32_t layer = 0; layer < meta->shard.layer_count; ++layer) {
      for (uint32_t head = 0; head < meta->shard.head_count; ++head) {
        for (uint32_t token = 0; token < claim->tokens; ++token) {
          const BlockId block = claim->tables[0].blocks[token / size];
          const std::byte* k = view.K(layer, block, head, token % size);
          const std::byte* v = view.V(layer, block, head, token % size);
          kv.insert(kv.end(), k, k + row);
          kv.insert(kv.end(), v, v + row);
        }
      }
    }
    return kv;
  }
  bool MovesBack() {
    return ReadsFrom(*prefill) == decode->endpoint() &&
           Count(*decode, "kvrelay_capped_bytes_total") > 0;
  }
};

TEST_F(ReuseMidPull, WhatTakesLongerThanAPullMayTakeIsComputed) {
  BeginSlowly({"--pull_timeout_ms=500"});
  Talk talk = LongTalk();
  Ask(talk, 1);
  const Talk before = talk;
  const Json summary = Ask(talk, 2);
  ExpectComputesAll(summary, before);
  EXPECT_GE(summary["timing_ms"]["reuse"], 500) << "it was tried";
  EXPECT_GT(Count(*decode, "kvrelay_capped_bytes_total"), 0);
  EXPECT_EQ(Count(*prefill, "kvrelay_reuse_total{outcome=\"kDeadlineExceeded\"}"), 1);
  EXPECT_THAT(prefill->log(), HasSubstr("nothing is reused, all is computed: "));
  ExpectNothingLeft();
}

TEST_F(ReuseMidPull, TheDecodeDaemonDiesAndTheNextOneAnswers) {
  BeginSlowly();
  Talk talk = LongTalk();
  Ask(talk, 1);
  auto turn = std::async(std::launch::async, [endpoint = decode->endpoint(), ask = talk.Turn()] {
    return integration::Ask(endpoint, ask);
  });
  EXPECT_TRUE(Eventually("a part has come back", [&] { return MovesBack(); }));
  decode->Kill();
  EXPECT_FALSE(turn.get().has_value());
  ExpectIdle(*prefill);
  EXPECT_EQ(Count(*prefill, "kvrelay_reuse_total{outcome=\"ok\"}"), 0);
  EXPECT_THAT(prefill->log(), HasSubstr("decode " + decode->endpoint()));
  decode = &StartDecode({prefill}, {"--reuse_from_decode", "--transport=ucx-packed"});
  const Talk before = talk;
  ExpectComputesAll(Ask(talk, 2), before);
  ExpectNothingLeft();
}

// Another worker holds the decode daemon's own request, so that whoever takes the KV outlives the
// daemon that offered it.
TEST_F(ReuseMidPull, TheDecodeDaemonDiesAndAllIsComputed) {
  prefill = &StartPrefill({"--reuse_from_decode"});
  Daemon& holder = StartPrefill({kSlowPrefill});
  decode = &StartDecode({prefill, &holder}, {"--reuse_from_decode", "--transport=ucx-packed",
                                             "--max_bytes_per_s=" + std::to_string(kBytesPerS)});
  Talk talk = LongTalk();
  const auto known = static_cast<uint32_t>(talk.tokens() + kAnswer - 1);
  EXPECT_EQ(Ask(talk, 1)["prefill"], prefill->endpoint());
  auto turn = std::async(std::launch::async, [endpoint = decode->endpoint(), ask = talk.Turn()] {
    return integration::Ask(endpoint, ask);
  });
  ASSERT_TRUE(
      Eventually("the holder has the request", [&] { return HasLease(holder, "claimed"); }));
  holder.Freeze();
  const Json leases = Look(*decode)["leases"];
  ASSERT_EQ(leases.size(), 1U);
  proto::Reuse offer =
      OfferOf(DirectReader(decode->endpoint()), decode->endpoint(), talk.history, known);
  offer.ticket.prompt.lease = LeaseOf(leases[0]);
  auto computing = std::async(std::launch::async, [&] { return Prefill(talk.history, {offer}); });
  EXPECT_TRUE(Eventually("a part has come", [&] { return MovesBack(); }));
  decode->Kill();
  const auto computed = computing.get();
  EXPECT_FALSE(turn.get().has_value());
  holder.Thaw();
  ASSERT_TRUE(computed.has_value()) << computed.error().ToString();
  EXPECT_EQ(computed->last.reused_tokens, 0U);
  EXPECT_EQ(computed->last.computed_tokens, talk.tokens());
  EXPECT_THAT(prefill->log(), HasSubstr("nothing is reused, all is computed: "));
  const auto alone = Prefill(talk.history, {});
  ASSERT_TRUE(alone.has_value()) << alone.error().ToString();
  const std::vector<std::byte> kv = KvOf(computed->ticket);
  EXPECT_EQ(kv.size(), talk.tokens() * kTokenBytes);
  EXPECT_TRUE(kv == KvOf(alone->ticket)) << "not a bit is left of what had come";
  ExpectIdle(*prefill);
  ExpectIdle(holder);
}

}  // namespace
}  // namespace kvrelay::integration
