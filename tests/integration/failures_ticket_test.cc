// Readers that are late, forge, or ask for what is not theirs: the prefill daemon says no, by name,
// and serves the next request.
#include <gmock/gmock.h>

#include <functional>
#include <tuple>

#include "tests/integration/direct.h"
#include "tests/integration/failure_story.h"

namespace kvrelay::integration {
namespace {

using ::testing::HasSubstr;

class Tickets : public FailureStory {
 protected:
  // A prefill daemon and a reader with the ticket of 100 tokens.
  void Begin(Args flags = {}) {
    prefill = &StartPrefill(std::move(flags));
    reader.emplace(prefill->endpoint());
    ticket = Ticket(Tokens(100));
  }
  proto::Ticket Ticket(const std::vector<uint32_t>& token_ids) {
    const auto offered = reader->Prefill(token_ids);
    EXPECT_TRUE(offered) << offered.error().ToString();
    return offered.value_or(proto::Ticket{});
  }
  void WaitForTheEndOfAllLeases() {
    Eventually("the leases are over", [&] {
      const Json look = Look(*prefill);
      return look.is_object() && look["leases"].empty();
    });
  }
  // All is given back, and a well-behaved daemon is served.
  void ExpectUnharmed() {
    ExpectIdle(*prefill);
    Daemon& decode = StartDecode({prefill});
    ExpectServes(decode);
    ExpectIdle(*prefill);
    ExpectIdle(decode);
  }
  static void ExpectRefused(const Status& status, Code code, const std::string& says = "") {
    EXPECT_EQ(CodeName(status.code()), CodeName(code)) << status.ToString();
    EXPECT_THAT(status.message(), HasSubstr(says));
  }
  template <typename T>
  static Status StatusOf(const Result<T>& result) {
    return result ? Status::Ok() : result.error();
  }

  Daemon* prefill = nullptr;
  std::optional<DirectReader> reader;
  proto::Ticket ticket;
};

TEST_F(Tickets, AnExpiredLeaseIsEnded) {
  Begin({"--tp=2", "--lease_ttl_ms=300"});
  WaitForTheEndOfAllLeases();
  ExpectRefused(StatusOf(reader->Claim(ticket)), Code::kLeaseEnded, "ttl");
  EXPECT_EQ(Count(*prefill, "kvrelay_leases_ended_total{reason=\"ttl\"}"), 1);
  ExpectUnharmed();
}

TEST_F(Tickets, AClaimWithoutHeartbeatsEnds) {
  Begin({"--lease_ttl_ms=300"});
  ASSERT_TRUE(reader->Claim(ticket));
  WaitForTheEndOfAllLeases();
  ExpectRefused(StatusOf(reader->Claim(ticket)), Code::kLeaseEnded, "reader_silent");
  EXPECT_EQ(reader->Heartbeat(ticket).value(), std::vector<LeaseId>{ticket.prompt.lease});
  ExpectUnharmed();
}

TEST_F(Tickets, ARepeatedClaimIsTheSameAndOneAfterItsReleaseIsRefused) {
  Begin();
  const auto claim = reader->Claim(ticket);
  const auto again = reader->Claim(ticket);
  ASSERT_TRUE(claim && again);
  EXPECT_EQ(again->tables, claim->tables);
  EXPECT_EQ(again->ranks[0].epoch, claim->ranks[0].epoch);
  ASSERT_TRUE(reader->Release(ticket).ok());
  ASSERT_TRUE(reader->Release(ticket).ok()) << "idempotent";
  ExpectRefused(StatusOf(reader->Claim(ticket)), Code::kLeaseEnded, "released");
  ExpectUnharmed();
}

TEST_F(Tickets, ATicketOfAFormerProcessIsEnded) {
  Begin();
  prefill->Kill();
  Daemon& next = StartPrefill({"--listen=" + prefill->endpoint()});
  prefill = &next;
  reader.emplace(next.endpoint());
  ExpectRefused(StatusOf(reader->Claim(ticket)), Code::kLeaseEnded, "restarted");
  ExpectUnharmed();
}

TEST_F(Tickets, AForgedLeaseIsRefused) {
  Begin();
  proto::Ticket forged = ticket;
  forged.prompt.lease.bytes[7] ^= 1;
  ExpectRefused(StatusOf(reader->Claim(forged)), Code::kRefused);
  EXPECT_EQ(reader->Heartbeat(forged).value(), std::vector<LeaseId>{forged.prompt.lease});
  EXPECT_TRUE(reader->Release(forged).ok());
  EXPECT_TRUE(reader->Claim(ticket)) << "the real one is as good as before";
  EXPECT_TRUE(reader->Release(ticket).ok());
  ExpectUnharmed();
}

TEST_F(Tickets, ATicketOfAnotherRequestOfTheSameSizeIsRefused) {
  Begin();
  const proto::Ticket other = Ticket(Tokens(100, 2));
  proto::Ticket mixed = ticket;
  mixed.prompt.hash = other.prompt.hash;
  ExpectRefused(StatusOf(reader->Claim(mixed)), Code::kRefused, "another prompt");
  mixed = ticket;
  mixed.prompt.lease = other.prompt.lease;
  ExpectRefused(StatusOf(reader->Claim(mixed)), Code::kRefused, "another prompt");
  proto::Ticket longer = ticket;
  ++longer.prompt.tokens;
  ExpectRefused(StatusOf(reader->Claim(longer)), Code::kRefused, "101");
  proto::Ticket of_other_model = ticket;
  of_other_model.model.bytes[0] ^= 1;
  ExpectRefused(StatusOf(reader->Claim(of_other_model)), Code::kIncompatible,
                of_other_model.model.ToHex());
  for (const proto::Ticket& t : {ticket, other}) {
    ASSERT_TRUE(reader->Claim(t));
    ASSERT_TRUE(reader->Release(t).ok());
  }
  ExpectUnharmed();
}

TEST_F(Tickets, SomebodyElseCanNotReleaseMyClaim) {
  Begin();
  ASSERT_TRUE(reader->Claim(ticket));
  DirectReader stranger(prefill->endpoint());
  EXPECT_TRUE(stranger.Release(ticket).ok());
  EXPECT_EQ(reader->Heartbeat(ticket).value(), std::vector<LeaseId>{}) << "still mine";
  EXPECT_TRUE(reader->Release(ticket).ok());
  ExpectUnharmed();
}

TEST_F(Tickets, PackedReadsOfWhatIsNotTheLeasesAreRefused) {
  Begin({"--tp=2"});
  const auto claim = reader->Claim(ticket);
  ASSERT_TRUE(claim);
  const proto::ClaimRank& rank = claim->ranks[1];
  const auto meta = reader->GetMeta(rank);
  ASSERT_TRUE(meta) << meta.error().ToString();
  const proto::PackedRead good = reader->ReadFor(ticket, rank, *meta);
  using Edit = std::function<void(proto::PackedRead&)>;
  const std::vector<std::tuple<std::string, Edit, Code>> cases = {
      {"epoch", [](auto& r) { ++r.epoch; }, Code::kLeaseEnded},
      {"lease", [](auto& r) { r.lease.bytes[0] ^= 1; }, Code::kLeaseEnded},
      {"incarnation", [](auto& r) { ++r.owner_incarnation; }, Code::kLeaseEnded},
      {"tokens behind", [](auto& r) { ++r.shape.tokens.end; }, Code::kRefused},
      {"tokens far behind",
       [](auto& r) {
         r.shape.tokens = {1000, 1 << 19};
       },
       Code::kRefused},
      {"no tokens",
       [](auto& r) {
         r.shape.tokens = {5, 5};
       },
       Code::kRefused},
      {"layers", [](auto& r) { r.shape.layers.push_back(r.shape.layers.back() + 1); },
       Code::kRefused},
      {"no layers", [](auto& r) { r.shape.layers.clear(); }, Code::kRefused},
      {"heads of rank 0", [](auto& r) { r.shape.head_begin = 0; }, Code::kRefused},
      {"heads behind", [](auto& r) { ++r.shape.head_end; }, Code::kRefused},
      {"row", [](auto& r) { r.shape.head_dim *= 2; }, Code::kIncompatible},
      {"transport", [](auto& r) { r.transport = "mapped"; }, Code::kIncompatible},
      {"chunk", [](auto& r) { r.chunk_bytes = 1; }, Code::kInvalidArgument}};
  for (const auto& [what, edit, code] : cases) {
    SCOPED_TRACE(what);
    proto::PackedRead read = good;
    edit(read);
    ExpectRefused(reader->Send(rank.endpoint, read), code);
  }
  // The rank sends nothing into the void for ever, and is not lost on it.
  std::ignore = reader->Send(rank.endpoint, good);
  EXPECT_TRUE(reader->Release(ticket).ok());
  ExpectRefused(reader->Send(rank.endpoint, good), Code::kLeaseEnded);
  ExpectUnharmed();
}

// A reader that mapped the cache keeps its mapping: only the lease record can tell it that the
// blocks are another prompt's now.
TEST_F(Tickets, AMappingThatOutlivesItsLeaseReadsNothing) {
  Begin({"--transport=mapped", "--lease_ttl_ms=2000", "--kv_blocks=16"});
  const auto claim = reader->Claim(ticket);
  ASSERT_TRUE(claim);
  const proto::ClaimRank& rank = claim->ranks[0];
  const auto meta = reader->GetMeta(rank);
  ASSERT_TRUE(meta);
  DirectMapping mapping(*meta, folder());
  ASSERT_EQ(mapping.status().ToString(), Status::Ok().ToString());
  const GuardExpectation want = reader->GuardFor(ticket, *claim, rank, *meta);

  const transport::Completion good = mapping.Read(*claim, rank);
  EXPECT_TRUE(good.status.ok()) << good.status.ToString();
  EXPECT_TRUE(GuardHolds(want, good.before, good.after)) << "while the lease lives";
  const std::vector<std::byte> bytes = mapping.memory();

  WaitForTheEndOfAllLeases();
  const proto::Ticket next = Ticket(Tokens(250, 2));  // all 16 blocks
  const transport::Completion stale = mapping.Read(*claim, rank);
  EXPECT_FALSE(stale.status.ok() && GuardHolds(want, stale.before, stale.after));
  EXPECT_NE(mapping.memory(), bytes) << "the blocks were not used again: this proved nothing";
  ExpectUnharmed();
}

TEST_F(Tickets, APackedReadOfALeaseThatRanOutIsEnded) {
  Begin({"--transport=ucx-packed", "--lease_ttl_ms=300", "--kv_blocks=16"});
  const auto claim = reader->Claim(ticket);
  ASSERT_TRUE(claim);
  const auto meta = reader->GetMeta(claim->ranks[0]);
  ASSERT_TRUE(meta);
  WaitForTheEndOfAllLeases();
  const proto::Ticket next = Ticket(Tokens(250, 2));
  const proto::PackedRead late = reader->ReadFor(ticket, claim->ranks[0], *meta);
  ExpectRefused(reader->Send(claim->ranks[0].endpoint, late), Code::kLeaseEnded);
  // Nor with the living lease's name: its epoch is another.
  proto::PackedRead crossed = late;
  crossed.lease = next.prompt.lease;
  ExpectRefused(reader->Send(claim->ranks[0].endpoint, crossed), Code::kLeaseEnded);
  ExpectUnharmed();
}

}  // namespace
}  // namespace kvrelay::integration
