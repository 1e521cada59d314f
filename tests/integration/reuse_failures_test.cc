// Conversations whose decode daemon or whose lease is gone: the answers are those of one process,
// and nothing is left.
#include <future>
#include <optional>
#include <thread>

#include "tests/integration/direct.h"
#include "tests/integration/reuse_story.h"

namespace kvrelay::integration {
namespace {

class ReuseFails : public ReuseStory {};

TEST_F(ReuseFails, NoConversationSurvivesItsDecodeDaemon) {
  Begin();
  Talk talk;
  Ask(talk, 1);
  decode->Kill();
  decode = &StartDecode({prefill}, {"--reuse_from_decode"});
  const Talk before = talk;
  ExpectComputesAll(Ask(talk, 2), before);
  EXPECT_GT(Ask(talk, 3)["kv"]["reused_tokens"], 0);
  ExpectNothingLeft();
}

// The lease ends while the prefill daemon does not listen; the request goes on without.
TEST_F(ReuseFails, ALeaseThatEndedCostsOnlyTheReuse) {
  Begin({}, {"--lease_ttl_ms=500"});
  Talk talk;
  Ask(talk, 1);
  prefill->Freeze();
  const Talk before = talk;
  auto turn = std::async(std::launch::async, [&] { return Ask(talk, 2); });
  Eventually("the unclaimed lease is over",
             [&] { return Count(*decode, "kvrelay_leases_ended_total{reason=\"ttl\"}") > 0; });
  prefill->Thaw();
  const Json summary = turn.get();
  ExpectComputesAll(summary, before);
  EXPECT_GE(Count(*prefill, "kvrelay_reuse_total{outcome=\"kLeaseEnded\"}"), 1);
  ExpectNothingLeft();
}

// The prefill daemon has no room for the next turn as long as another reader wants a prompt of its.
class ReuseThatWaits : public ReuseStory {
 protected:
  // The second turn, in work and without room; its lease, which lasts for `ttl` without heartbeats,
  // is claimed.
  std::future<Json> StartSecondTurn(Talk& talk, Duration ttl) {
    Begin({"--kv_blocks=24"}, {"--lease_ttl_ms=" + std::to_string(ttl / Millis(1))});
    Ask(talk, 1);
    reader_.emplace(prefill->endpoint());
    const auto ticket = reader_->Prefill(Text(300, 5));
    EXPECT_TRUE(ticket.has_value() && reader_->Claim(*ticket).has_value());
    ticket_ = ticket.value_or(proto::Ticket{});
    auto turn = std::async(std::launch::async, [this, &talk] { return Ask(talk, 2); });
    Eventually("the prefill daemon claims what it is offered",
               [&] { return HasLease(*decode, "claimed"); });
    return turn;
  }
  void MakeRoom() { EXPECT_TRUE(reader_->Release(ticket_).ok()); }

 private:
  std::optional<DirectReader> reader_;
  proto::Ticket ticket_;
};

TEST_F(ReuseThatWaits, HeartbeatsKeepItsLease) {
  // A third of it, the time between them, is long against what a loaded machine holds up.
  constexpr Duration kTtl = Millis(3000) * Slowness();
  Talk talk;
  const size_t known = 100 + kAnswer - 1;
  auto turn = StartSecondTurn(talk, kTtl);
  std::this_thread::sleep_for(kTtl * 3 / 2);
  EXPECT_TRUE(HasLease(*decode, "claimed"));
  MakeRoom();
  const Json summary = turn.get();
  EXPECT_EQ(summary["kv"]["reused_tokens"], known);
  EXPECT_GT(summary["timing_ms"]["prefill"], ToMillis(kTtl)) << "it did wait";
  ExpectNothingLeft();
}

TEST_F(ReuseThatWaits, ASilentReaderLosesItsLease) {
  Talk talk;
  // It ends before the decode daemon finds that the connection is dead.
  auto turn = StartSecondTurn(talk, Millis(1500));
  prefill->Freeze();
  Eventually("the lease is over", [&] {
    return Count(*decode, "kvrelay_leases_ended_total{reason=\"reader_silent\"}") == 1;
  });
  prefill->Thaw();
  MakeRoom();
  const Json summary = turn.get();
  EXPECT_EQ(summary["kv"]["reused_tokens"], 0);
  EXPECT_EQ(summary["kv"]["computed_tokens"], 100 + kAnswer + 11);
  ExpectNothingLeft();
}

}  // namespace
}  // namespace kvrelay::integration
