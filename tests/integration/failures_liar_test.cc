// A prefill worker whose answers are wrong: the decode daemon gives that client a clear error, or
// has the prompt prefilled elsewhere, and goes on.
#include <gmock/gmock.h>

#include <memory>
#include <utility>

#include "tests/integration/direct.h"
#include "tests/integration/failure_story.h"
#include "tests/integration/fake_prefill.h"

namespace kvrelay::integration {
namespace {

using proto::Type;
using ::testing::HasSubstr;

struct Lie {
  std::string name;
  FakePrefill::Lies lies;
  // The error that the client gets.
  std::string code;
  std::string says;
};

std::string Garbage(Type /*type*/, const std::string& /*good*/) { return "\xc1garbage"; }

// Only what is asked by `type` is garbage.
auto GarbageFor(Type type) {
  return [type](Type asked, std::string good) {
    return asked == type ? Garbage(asked, good) : std::move(good);
  };
}

std::vector<Lie> Lies(const std::string& transport) {
  std::vector<Lie> lies = {
      {"FewerBlocksThanThePromptNeeds",
       {.claim = [](auto& claim) { claim.tables[0].blocks.resize(2); }},
       "kIncompatible",
       "owner's table covers tokens 0 to 32"},
      {"NoBlocks",
       {.claim = [](auto& claim) { claim.tables[0].blocks.clear(); }},
       "kIncompatible",
       "owner's table covers tokens 0 to 0"},
      {"NoTables",
       {.claim = [](auto& claim) { claim.tables.clear(); }},
       "kIncompatible",
       "owner's table covers tokens 0 to 0"},
      {"FewerTokens", {.claim = [](auto& claim) { claim.tokens = 7; }}, "kIncompatible", "+7"},
      {"NoRanks", {.claim = [](auto& claim) { claim.ranks.clear(); }}, "kIncompatible", "0 ranks"},
      {"RanksThatContradictEachOther",
       {.claim =
            [](auto& claim) {
              claim.ranks.push_back(claim.ranks[0]);
              claim.ranks[1].rank = 1;
              claim.ranks[1].shard.total_layers += 1;
            }},
       "kIncompatible",
       ""},
      {"RanksThatDoNotHoldAllHeads",
       {.claim =
            [](auto& claim) {
              claim.ranks[0].shard.head_count = 1;
              claim.ranks[0].shard.tp_size = 4;
            }},
       "kIncompatible",
       ""},
      {"ARecordThatDoesNotExist",
       {.claim = [](auto& claim) { claim.ranks[0].slot = 1U << 30; }},
       "kIncompatible",
       "slot 1073741824"},
      {"ARankThatIsNobody",
       {.claim = [](auto& claim) { claim.ranks[0].endpoint = "nowhere"; }},
       "kIncompatible",
       "nowhere"},
      {"ATicketOfAnotherFront",
       {.ticket = [](auto& ticket) { ticket.front = "tcp://127.0.0.1:1"; }},
       "kRefused",
       "tcp://127.0.0.1:1"},
      {"ATicketOfAnotherPrompt",
       {.ticket = [](auto& ticket) { ticket.prompt.hash.bytes[0] ^= 1; }},
       "kIncompatible",
       ""},
      {"ATicketOfFewerTokens",
       {.ticket = [](auto& ticket) { ticket.prompt.tokens -= 16; }},
       "kIncompatible",
       "tokens"},
      {"ATicketOfAnotherModel",
       {.ticket = [](auto& ticket) { ticket.model.bytes[0] ^= 1; }},
       "kIncompatible",
       "model"},
      {"ATicketWithAPrefixThatNobodyAskedFor",
       {.ticket = [](auto& ticket) { ticket.prefixes.push_back(ticket.prompt); }},
       "kIncompatible",
       ""},
      {"MetaOfAnotherCache",
       {.meta = [](auto& meta) { meta.layout.head_dim *= 2; }},
       "kIncompatible",
       ""},
      {"MetaThatLeavesItsRegions",
       {.meta = [](auto& meta) { meta.regions[0].bytes = 4096; }},
       "kIncompatible",
       ""},
      {"MetaWithoutRecords",
       {.meta = [](auto& meta) { meta.record_region = 77; }},
       "kIncompatible",
       "records"},
      {"GarbageAsPrefillReply", {.bytes = GarbageFor(Type::kPrefill)}, "kIncompatible", "PREFILL"},
      {"GarbageAsClaimReply", {.bytes = GarbageFor(Type::kClaim)}, "kIncompatible", "CLAIM"},
      {"GarbageAsMeta", {.bytes = GarbageFor(Type::kGetMeta)}, "kIncompatible", "META"},
  };
  // Where the owner packs, block ids mean nothing to the reader.
  if (transport == "mapped") {
    lies.push_back({"BlocksOutOfRange",
                    {.claim = [](auto& claim) { claim.tables[0].blocks.back() = 1U << 30; }},
                    "kIncompatible",
                    "1073741824"});
  }
  return lies;
}

class Liar : public FailureStory, public ::testing::WithParamInterface<std::string> {
 protected:
  Liar() : transport_("--transport=" + GetParam()) {}

  Daemon& StartRealPrefill() {
    Daemon& real = StartPrefill({transport_});
    DirectReader reader(real.endpoint());
    const proto::Ticket ticket = reader.Prefill(Tokens(20)).value_or(proto::Ticket{});
    const proto::ClaimReply claim = reader.Claim(ticket).value_or(proto::ClaimReply{});
    EXPECT_EQ(claim.ranks.size(), 1U);
    for (const proto::ClaimRank& rank : claim.ranks) {
      const auto meta = reader.GetMeta(rank);
      EXPECT_TRUE(meta);
      truth_ = {.model = reader.owner().model, .meta = meta.value_or(proto::Meta{})};
    }
    EXPECT_TRUE(reader.Release(ticket).ok());
    return real;
  }

  const std::string transport_;
  FakePrefill::Truth truth_;
};

TEST_P(Liar, MakesAClearErrorWhenItIsTheOnlyOne) {
  Daemon& real = StartRealPrefill();
  const Args ask = Ask(100, 8);
  for (const Lie& lie : Lies(GetParam())) {
    SCOPED_TRACE(lie.name);
    FakePrefill liar(truth_, lie.lies);
    Daemon& decode = StartDecode({}, {transport_, "--prefill=" + liar.endpoint()});
    const CliResult result = RunGenerate(decode, ask);
    EXPECT_EQ(liar.requests(), 1);
    ExpectFailure(result, 4, lie.code);
    EXPECT_THAT(Message(result), HasSubstr(lie.says));
    EXPECT_THAT(Message(result), HasSubstr("prefill ")) << "says whose fault it is";
    ExpectIdle(decode);
    decode.Kill();
  }
  ExpectIdle(real);
}

TEST_P(Liar, HarmsNobodyWhereOthersAreHonest) {
  Daemon& real = StartRealPrefill();
  std::vector<std::unique_ptr<FakePrefill>> liars;
  std::string prefills = "--prefill=";
  for (const Lie& lie : Lies(GetParam())) {
    liars.push_back(std::make_unique<FakePrefill>(truth_, lie.lies));
    prefills += liars.back()->endpoint() + ",";
  }
  Daemon& decode = StartDecode({}, {transport_, prefills + real.endpoint()});
  const Args ask = Ask(100, 8);
  // Those that were never asked come first, in the order of the list, three by a request.
  int lied = 0;
  const auto all = static_cast<int>(liars.size());
  while (lied + 3 <= all) {
    const CliResult result = RunGenerate(decode, ask);
    EXPECT_EQ(result.exit_code, 4) << result.out;
    lied += 3;
    int asked = 0;
    for (const auto& liar : liars) asked += liar->requests();
    EXPECT_EQ(asked, lied);
  }
  const CliResult result = RunGenerate(decode, ask);
  ExpectRightAnswer(result, ask);
  EXPECT_EQ(result.json()["prefill"], real.endpoint());
  EXPECT_EQ(result.json()["retries"], all - lied);
  ExpectIdle(decode);
  ExpectIdle(real);
}

// These may be bad luck, not lies: another prefill daemon is asked.
TEST_P(Liar, WhoseKvCanNotBeHadIsReplacedByAnother) {
  const std::vector<std::pair<std::string, FakePrefill::Lies>> lies = {
      // The real one's memory holds no such lease.
      {"NoLease", {}},
      {"ARankThatDoesNotListen",
       {.claim = [](auto& claim) { claim.ranks[0].endpoint = "tcp://127.0.0.1:1"; }}},
      {"MetaWithoutAWay", {.meta = [](auto& meta) { meta.addresses.clear(); }}},
  };
  Daemon& real = StartRealPrefill();
  const Args ask = Ask(100, 8);
  for (const auto& [name, lie] : lies) {
    SCOPED_TRACE(name);
    FakePrefill liar(truth_, lie);
    Daemon& decode = StartDecode({}, {transport_, "--pull_timeout_ms=1500",
                                      "--prefill=" + liar.endpoint() + "," + real.endpoint()});
    const CliResult result = RunGenerate(decode, ask);
    EXPECT_EQ(liar.requests(), 1);
    ExpectRightAnswer(result, ask);
    EXPECT_EQ(result.json()["prefill"], real.endpoint());
    EXPECT_EQ(result.json()["retries"], 1);
    ExpectIdle(decode);
  }
  ExpectIdle(real);
}

INSTANTIATE_TEST_SUITE_P(Transports, Liar, ::testing::Values("mapped", "ucx-packed"),
                         [](const auto& info) {
                           return info.param == "mapped" ? "Mapped" : "UcxPacked";
                         });

}  // namespace
}  // namespace kvrelay::integration
