// Bad messages to a daemon's listeners: their senders get errors, the daemon a counter, and the
// next request its right answer.
#include <gmock/gmock.h>
#include <zmq.h>

#include "proto/codec.h"
#include "proto/envelope.h"
#include "tests/agent/rpc_fixture.h"
#include "tests/integration/direct.h"
#include "tests/integration/failure_story.h"
#include "tests/kvcache/seed.h"

namespace kvrelay::integration {
namespace {

using agent::PlainSocket;
using Frames = std::vector<std::string>;
using testing_support::Pick;
using testing_support::Random;

std::string Envelope(proto::Type type, uint64_t id, std::string_view body) {
  return proto::EncodeEnvelope({type, id, false, 1000, body});
}

std::string Noise(Random& random) {
  std::string bytes(Pick(random, 0, 300), '\0');
  for (char& byte : bytes) byte = static_cast<char>(Pick(random, 0, 255));
  return bytes;
}

// A message that no listener can take for a request, whatever its random part is.
Frames BadMessage(Random& random, uint64_t id) {
  const std::string ping = Envelope(proto::Type::kPing, id, proto::Encode(proto::Empty{}));
  std::string damaged = ping;
  switch (Pick(random, 0, 8)) {
    case 0:
      return {Noise(random)};  // one frame
    case 1:
      return {"", "\xc1" + Noise(random)};  // 0xc1 is never msgpack
    case 2:
      return {"", ""};
    case 3:
      return {"", ping, ping};
    case 4:
      return {ping};  // no empty frame
    case 5:
      return {"", ping.substr(0, Pick(random, 1, static_cast<uint32_t>(ping.size()) - 1))};
    case 6:
      damaged.replace(damaged.find("PING"), 4, "PANG");
      return {"", damaged};
    case 7:
      damaged[damaged.find('v') + 2] = '\x09';  // major version 9
      return {"", damaged};
    default:
      return {"", std::string(200, '\x91')};  // arrays in arrays
  }
}

class BadMessages : public FailureStory {
 protected:
  // The endpoint of a rank other than the leader's, which has a listener of its own.
  static std::string EndpointOfRankOne(const Daemon& prefill) {
    DirectReader reader(prefill.endpoint());
    const auto ticket = reader.Prefill(Tokens(20));
    if (!ticket) return "";
    const auto claim = reader.Claim(*ticket);
    EXPECT_TRUE(reader.Release(*ticket).ok());
    return claim ? claim->ranks.at(1).endpoint : "";
  }
};

TEST_F(BadMessages, AThousandOfThemToFrontAndRanksHarmNobody) {
  Daemon& prefill = StartPrefill({"--tp=2"});
  Daemon& decode = StartDecode({&prefill});
  const std::string rank = EndpointOfRankOne(prefill);
  ASSERT_NE(rank, "");
  Random random(testing_support::TestSeed());
  constexpr int kEach = 1000;
  for (const std::string& endpoint : {prefill.endpoint(), rank, decode.endpoint()}) {
    PlainSocket socket(ZMQ_DEALER, endpoint, 0);
    for (uint64_t id = 1; id <= kEach; ++id) socket.Send(BadMessage(random, id));
    const Daemon& daemon = endpoint == decode.endpoint() ? decode : prefill;
    const double expected = endpoint == rank ? 2 * kEach : kEach;
    Eventually("all are counted",
               [&] { return Count(daemon, "kvrelay_bad_messages_total") >= expected; });
  }
  ExpectServes(decode);
  ExpectIdle(decode);
  ExpectIdle(prefill);
}

TEST_F(BadMessages, EveryRequestWithANonsenseBodyIsAnsweredWithAnError) {
  Daemon& prefill = StartPrefill({"--tp=2"});
  Daemon& decode = StartDecode({&prefill});
  const std::string rank = EndpointOfRankOne(prefill);
  Random random(testing_support::TestSeed());
  for (const std::string& endpoint : {prefill.endpoint(), rank, decode.endpoint()}) {
    auto client = agent::Client::Connect(endpoint);
    ASSERT_TRUE(client);
    for (int type = 0; type < 256; ++type) {
      const std::string_view name = proto::TypeName(static_cast<proto::Type>(type));
      if (!proto::TypeFromName(name)) continue;
      switch (static_cast<proto::Type>(type)) {
        case proto::Type::kPing:  // these have nothing in their bodies
        case proto::Type::kHealth:
        case proto::Type::kDescribe:
        case proto::Type::kCancelCall:  // is never answered
          continue;
        default:
          break;
      }
      const auto reply = client->Call(static_cast<proto::Type>(type), "\xc1" + Noise(random),
                                      std::chrono::seconds(20));
      ASSERT_FALSE(reply) << name;
      EXPECT_EQ(CodeName(reply.error().code()), CodeName(Code::kInvalidArgument))
          << name << ": " << reply.error().ToString();
    }
  }
  // As bad messages, whatever their envelopes: CLAIM, HEARTBEAT, RELEASE and all.
  for (const Daemon* daemon : {&prefill, &decode}) {
    EXPECT_GE(Count(*daemon, "kvrelay_bad_messages_total{reason=\"body\"}"), 8) << daemon->name();
  }
  ExpectServes(decode);
  ExpectIdle(decode);
  ExpectIdle(prefill);
}

// What only an engine's own leader may say, from somebody else.
TEST_F(BadMessages, StrangersDoNotCommandRanks) {
  Daemon& prefill = StartPrefill({"--tp=2"});
  const std::string rank = EndpointOfRankOne(prefill);
  DirectReader reader(prefill.endpoint());
  const auto ticket = reader.Prefill(Tokens(100));
  ASSERT_TRUE(ticket);
  const auto claim = reader.Claim(*ticket);
  ASSERT_TRUE(claim);
  const auto meta = reader.GetMeta(claim->ranks[1]);
  ASSERT_TRUE(meta);

  const auto code = [&](proto::Type type, const auto& body) {
    const auto reply = reader.Call(rank, type, proto::Encode(body));
    return std::string(CodeName(reply ? Code::kOk : reply.error().code()));
  };
  const proto::Start start{.leader = 5,
                           .rank_incarnation = claim->ranks[1].incarnation,
                           .lease = ticket->prompt.lease,
                           .tables = {{.blocks = {0, 1}}},
                           .first_token = 0,
                           .tokens = 20,
                           .prompt_hash = ticket->prompt.hash,
                           .cap_ms = 1000};
  EXPECT_EQ(code(proto::Type::kStart, start), "kRefused");
  EXPECT_EQ(code(proto::Type::kDrop, proto::Drop{.leader = 5, .number = 1}), "kRefused");
  EXPECT_EQ(code(proto::Type::kHello, proto::Hello{.leader = 5, .challenge = 12345}), "kRefused");
  EXPECT_TRUE(reader.Heartbeat(*ticket)->empty()) << "the lease lives";
  EXPECT_TRUE(reader.Release(*ticket).ok());
  ExpectIdle(prefill);
  Daemon& decode = StartDecode({&prefill});
  ExpectServes(decode);
}

TEST_F(BadMessages, WhatIsNotZeroMqIsCounted) {
  Daemon& prefill = StartPrefill();
  const std::string port = prefill.endpoint().substr(prefill.endpoint().rfind(':') + 1);
  Result<tools::ChildProcess> http = tools::ChildProcess::Start(
      {.argv = {"/bin/bash", "-c",
                "for i in {1..20}; do exec {fd}<>/dev/tcp/127.0.0.1/" + port +
                    "; printf 'GET /%03d HTTP/1.0\\r\\n\\r\\n%0200d' $i 0 >&$fd; done; sleep 60"}});
  ASSERT_TRUE(http);
  // As failed handshakes, or by a libzmq that takes them for ZMTP 1.0 (4.3.5) as bad messages of
  // peers whose names are what they begin with.
  Eventually("they are counted",
             [&] { return Count(prefill, "kvrelay_bad_messages_total") >= 20; });
  Daemon& decode = StartDecode({&prefill});
  ExpectServes(decode);
  ExpectIdle(prefill);
}

}  // namespace
}  // namespace kvrelay::integration
