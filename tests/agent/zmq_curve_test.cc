// Calls with keys: who may call whom, and what those get who may not.
#include <gtest/gtest.h>

#include <memory>
#include <optional>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "agent/client.h"
#include "proto/limits.h"
#include "tests/agent/rpc_fixture.h"
#include "tests/common/slowness.h"
#include "transport/curve.h"

namespace kvrelay::agent {
namespace {

using proto::Type;
using std::chrono::seconds;
using transport::CurveIdentity;
using transport::KeyedEndpoint;

using Identity = std::shared_ptr<CurveIdentity>;

Identity New() { return std::make_shared<CurveIdentity>(transport::NewCurveIdentity()); }

class Curve : public RpcFixture {
 protected:
  Curve() {
    server_key->allowed.insert(client_key->public_key);
    client_key->allowed.insert(server_key->public_key);
    ServeAs(server_key);
    CallAs(client_key);
  }

  void ServeAs(Identity identity) {
    ZmqRpc::Options options;
    options.curve = std::move(identity);
    StartServer("tcp://127.0.0.1:0", options);
    server().Handle(Type::kPing, [](std::string_view body, const ResponderPtr& responder) {
      responder->Reply(std::string(body), false);
    });
  }
  void CallAs(Identity identity) {
    ZmqRpc::Options options;
    options.curve = std::move(identity);
    StartClient(options);
  }

  // A call's error, long before its deadline.
  Status CallError(const std::string& to) {
    std::optional<Result<std::string>> reply;
    const TimePoint begin = loop().Now();
    client().Call(to, Type::kPing, "", In(seconds(60)),
                  [&](Result<std::string> got, bool) { reply = std::move(got); });
    EXPECT_TRUE(RunUntil([&] { return reply.has_value(); }));
    if (!reply.has_value()) return {Code::kInternal, "the call did not end"};
    EXPECT_LT(loop().Now() - begin, seconds(2) * tests::Slowness());
    EXPECT_FALSE(reply->has_value());
    return reply->has_value() ? Status::Ok() : reply->error();
  }

  std::string WithoutKey() const { return KeyedEndpoint::FromText(endpoint())->endpoint; }
  void ExpectServing() {
    CallAs(client_key);
    EXPECT_EQ(Call(Type::kPing, "alive").body(), "alive");
  }

  Identity server_key = New();
  Identity client_key = New();
};

TEST_F(Curve, CallsGoBothWaysBetweenTwoThatAllowEachOther) {
  EXPECT_EQ(endpoint(), WithoutKey() + "#" + transport::KeyToText(server_key->public_key));
  EXPECT_EQ(Call(Type::kPing, "hello").body(), "hello");
  std::string large(proto::kMaxBodyBytes, '\0');
  for (size_t i = 0; i < large.size(); ++i) large[i] = static_cast<char>(i * 31 >> 3);
  EXPECT_EQ(Call(Type::kPing, large, Millis(10'000)).body(), large) << "the longest there is";
}

TEST_F(Curve, OneThatCallsItselfNeedsNoList) {
  const Identity alone = New();
  ServeAs(alone);
  CallAs(alone);
  EXPECT_EQ(Call(Type::kPing, "me").body(), "me");
}

TEST_F(Curve, PingsKeepAConnectionThatWaits) {
  ZmqRpc::Options options;
  options.curve = server_key;
  options.socket.heartbeat = Millis(100);
  options.socket.silence = Millis(500) * tests::Slowness();
  StartServer("tcp://127.0.0.1:0", options);
  ResponderPtr kept;
  server().Handle(Type::kGenerate,
                  [&](std::string_view, ResponderPtr responder) { kept = std::move(responder); });
  options.curve = client_key;
  StartClient(options);
  std::string got;
  client().Call(endpoint(), Type::kGenerate, "", In(seconds(60)),
                [&](const Result<std::string>& reply, bool) { got = reply.value_or("failed"); });
  ASSERT_TRUE(RunUntil([&] { return kept != nullptr; }));
  RunFor(Millis(900) * tests::Slowness());
  EXPECT_FALSE(kept->cancelled());
  kept->Reply("late", false);
  EXPECT_TRUE(RunUntil([&] { return !got.empty(); }));
  EXPECT_EQ(got, "late");
}

TEST_F(Curve, AKeyThatIsNotAllowedIsRefused) {
  const Identity stranger = New();
  stranger->allowed.insert(server_key->public_key);
  CallAs(stranger);
  EXPECT_EQ(CallError(endpoint()).ToString(), "kRefused: " + endpoint() +
                                                  " does not allow our key " +
                                                  transport::KeyToText(stranger->public_key));
  EXPECT_TRUE(RunUntil([&] { return BadMessages("key") == 1; }));
  ExpectServing();
}

TEST_F(Curve, ACallerWithoutKeysIsRefused) {
  CallAs(nullptr);
  const Status status = CallError(WithoutKey());
  EXPECT_EQ(status.code(), Code::kPeerUnreachable) << status.ToString();
  EXPECT_NE(status.message().find("does it ask for keys"), std::string::npos) << status.message();
  EXPECT_TRUE(RunUntil([&] { return BadMessages("handshake") > 0; }));
  EXPECT_EQ(CallError(endpoint()).ToString(),
            "kRefused: " + endpoint() + " asks for a key, and we have none");
  ExpectServing();
}

TEST_F(Curve, AServerWithAnotherKeyThanExpectedIsRefused) {
  const Identity expected = New();
  client_key->allowed.insert(expected->public_key);
  const std::string other =
      KeyedEndpoint{.endpoint = WithoutKey(), .key = expected->public_key}.ToText();
  EXPECT_EQ(CallError(other).ToString(),
            "kRefused: who listens at " + other + " does not have that key");
  EXPECT_TRUE(RunUntil([&] { return BadMessages("handshake") > 0; }));
  ExpectServing();
}

TEST_F(Curve, AServerWithoutKeysIsRefused) {
  ServeAs(nullptr);
  const std::string keyed =
      KeyedEndpoint{.endpoint = endpoint(), .key = server_key->public_key}.ToText();
  EXPECT_EQ(CallError(keyed).ToString(),
            "kRefused: who listens at " + keyed + " does not have that key");
  EXPECT_EQ(CallError(endpoint()).ToString(),
            "kRefused: " + endpoint() + " names no key, and with keys we call nobody without one");
  CallAs(nullptr);
  EXPECT_EQ(Call(Type::kPing, "plain").body(), "plain");
}

TEST_F(Curve, NobodyWhoseKeyIsNotAllowedIsCalled) {
  const std::string other =
      KeyedEndpoint{.endpoint = WithoutKey(), .key = New()->public_key}.ToText();
  EXPECT_EQ(CallError(other).ToString(),
            "kRefused: the key of " + other + " is not one that we allow");
  EXPECT_EQ(CallError(WithoutKey() + "#short").code(), Code::kInvalidArgument);
}

TEST_F(Curve, OneThatIsSilentInTheHandshakeIsUnreachable) {
  const SilentListener listener;
  ZmqRpc::Options options;
  options.curve = client_key;
  options.socket.handshake = Millis(200);
  StartClient(options);
  const std::string silent =
      KeyedEndpoint{.endpoint = listener.endpoint(), .key = server_key->public_key}.ToText();
  EXPECT_EQ(CallError(silent).ToString(),
            "kPeerUnreachable: " + silent + " did not finish the handshake in 200 ms");
}

TEST_F(Curve, AStormOfStrangersThenAFriend) {
  const Identity stranger = New();
  stranger->allowed.insert(server_key->public_key);
  constexpr int kStrangers = 40;
  int refused = 0;
  std::vector<std::unique_ptr<ZmqRpc>> strangers;
  for (int i = 0; i < kStrangers; ++i) {
    ZmqRpc::Options options;
    if (i % 2 == 0) options.curve = stranger;
    strangers.push_back(ZmqRpc::Create(loop(), counters(), options).value());
    strangers.back()->Call(options.curve ? endpoint() : WithoutKey(), Type::kPing, "",
                           In(seconds(60)), [&](const Result<std::string>& reply, bool) {
                             EXPECT_FALSE(reply.has_value());
                             ++refused;
                           });
  }
  const PlainSocket plain(ZMQ_DEALER, WithoutKey());
  EXPECT_EQ(Call(Type::kPing, "in between", Millis(10'000)).body(), "in between");
  EXPECT_TRUE(RunUntil([&] { return refused == kStrangers; })) << refused;
  EXPECT_TRUE(RunUntil([&] { return BadMessages("key") == kStrangers / 2; })) << BadMessages("key");
  ExpectServing();
}

TEST_F(Curve, AClientOfItsOwnThreadHasKeysToo) {
  EventLoop server_loop;
  Counters server_counters;
  ZmqRpc::Options options;
  options.listen = "tcp://127.0.0.1:0";
  options.curve = server_key;
  auto rpc = ZmqRpc::Create(server_loop, server_counters, options).value();
  rpc->Handle(Type::kPing, [](std::string_view body, const ResponderPtr& responder) {
    responder->Reply(std::string(body), false);
  });
  const std::string at = rpc->endpoint();
  std::thread thread([&] { server_loop.Run(); });
  {
    auto client = Client::Connect(at, client_key);
    ASSERT_TRUE(client.has_value()) << client.error().ToString();
    EXPECT_EQ(client->Call(Type::kPing, "hello", Millis(10'000)).value_or("failed"), "hello");
    auto keyless = Client::Connect(at);
    ASSERT_TRUE(keyless.has_value()) << keyless.error().ToString();
    EXPECT_EQ(keyless->Call(Type::kPing, "", Millis(10'000)).error().code(), Code::kRefused);
    EXPECT_EQ(Client::Connect("tcp://127.0.0.1:7600#x").error().code(), Code::kInvalidArgument);
  }
  server_loop.Stop();
  thread.join();
}

}  // namespace
}  // namespace kvrelay::agent
