// Calls over real sockets on loopback, well-behaved on both sides. zmq_abuse_test.cc has the
// others.
#include "agent/zmq_rpc.h"

#include <gtest/gtest.h>
#include <zmq.h>

#include <optional>
#include <string>
#include <vector>

#include "proto/codec.h"
#include "proto/envelope.h"
#include "proto/limits.h"
#include "tests/agent/rpc_fixture.h"

namespace kvrelay::agent {
namespace {

using proto::Type;

TEST_F(RpcFixture, AnAnswerComesBack) {
  server().Handle(Type::kPing, [](std::string_view body, const ResponderPtr& responder) {
    EXPECT_FALSE(responder->cancelled());
    responder->Reply("pong to " + std::string(body), false);
  });
  const Outcome outcome = Call(Type::kPing, "one");
  EXPECT_EQ(outcome.body(), "pong to one");
}

TEST_F(RpcFixture, ErrorsArriveWithCodeAndText) {
  server().Handle(Type::kClaim, [](std::string_view, const ResponderPtr& responder) {
    responder->Fail({Code::kLeaseEnded, "lease 12 expired 5 ms ago"});
    responder->Reply("late", false);  // dropped: the call is answered
  });
  const Outcome outcome = Call(Type::kClaim);
  EXPECT_EQ(outcome.status().ToString(), "kLeaseEnded: lease 12 expired 5 ms ago");
}

TEST_F(RpcFixture, BytesOfAnyValueAndSizeSurvive) {
  server().Handle(Type::kPing, [](std::string_view body, const ResponderPtr& responder) {
    responder->Reply(std::string(body), false);
  });
  std::string all(proto::kMaxBodyBytes, '\0');
  for (size_t i = 0; i < all.size(); ++i) all[i] = static_cast<char>(i * 31 >> 3);
  for (const size_t size : {size_t{0}, size_t{1}, size_t{4096}, all.size()}) {
    EXPECT_EQ(Call(Type::kPing, all.substr(0, size)).body(), all.substr(0, size)) << size;
  }
}

TEST_F(RpcFixture, TheCallbackNeverRunsInsideCall) {
  bool inside = true;
  int calls = 0;
  const auto count = [&](const Result<std::string>& reply, bool) {
    EXPECT_FALSE(inside);
    EXPECT_FALSE(reply.has_value());
    ++calls;
  };
  client().Call("tcp://", Type::kPing, "", In(Millis(1000)), count);            // no endpoint
  client().Call(endpoint(), Type::kPing, "", loop().Now() - Millis(1), count);  // too late
  client().Call(endpoint(), Type::kPing, std::string(proto::kMaxBodyBytes + 1, 'x'),
                In(Millis(1000)), count);
  inside = false;
  EXPECT_TRUE(RunUntil([&] { return calls == 3; }));
}

TEST_F(RpcFixture, WhatIsTooLargeIsRefusedWithBothSizes) {
  const std::string large(proto::kMaxBodyBytes + 1, 'x');
  EXPECT_EQ(Call(Type::kPing, large).status().ToString(),
            "kTooLarge: PING has 8387585 bytes, more than 8387584");
  server().Handle(Type::kPing, [&](std::string_view, const ResponderPtr& responder) {
    responder->Reply(large, false);
  });
  EXPECT_EQ(Call(Type::kPing).status().ToString(),
            "kTooLarge: the answer to PING has 8387585 bytes, more than 8387584");
}

TEST_F(RpcFixture, ADeadlineEndsTheCallAndTellsTheServer) {
  ResponderPtr kept;
  bool told = false;
  server().Handle(Type::kClaim, [&](std::string_view, ResponderPtr responder) {
    kept = std::move(responder);
    kept->OnCancel([&] {
      told = true;
      EXPECT_TRUE(kept->cancelled());
    });
  });
  const Outcome outcome = Call(Type::kClaim, "", Millis(60));
  EXPECT_EQ(outcome.status().code(), Code::kDeadlineExceeded);
  EXPECT_TRUE(outcome.status().message().starts_with(endpoint() + " did not answer CLAIM in "))
      << outcome.status().message();
  EXPECT_GE(outcome.took, Millis(60));
  EXPECT_TRUE(RunUntil([&] { return told; }));
  kept->Reply("nobody listens", false);
}

TEST_F(RpcFixture, ARefusedPortFailsQuickly) {
  StopServer();
  const Outcome outcome = Call(Type::kGetMeta, "", Millis(10'000));
  EXPECT_EQ(outcome.status().ToString(), "kPeerUnreachable: cannot connect to " + endpoint());
  EXPECT_LT(outcome.took, Millis(2000));
}

TEST_F(RpcFixture, AServerThatDiesDuringACallFailsItAndItsSuccessorIsFound) {
  std::vector<ResponderPtr> kept;
  server().Handle(Type::kPull, [&](std::string_view, ResponderPtr responder) {
    kept.push_back(std::move(responder));
  });
  std::optional<Status> first;
  std::optional<Status> second;
  for (auto* status : {&first, &second}) {
    client().Call(endpoint(), Type::kPull, "", In(Millis(20'000)),
                  [status](const Result<std::string>& reply, bool) { *status = reply.error(); });
  }
  ASSERT_TRUE(RunUntil([&] { return kept.size() == 2; }));

  StopServer();
  ASSERT_TRUE(RunUntil([&] { return first && second; })) << "well before the deadline of 20 s";
  EXPECT_EQ(first->ToString(), "kPeerUnreachable: the connection to " + endpoint() + " broke");
  EXPECT_EQ(second->code(), Code::kPeerUnreachable);
  for (const auto& responder : kept) responder->Reply("after the end", false);  // does nothing

  StartServer(endpoint());
  server().Handle(Type::kPull, [](std::string_view, const ResponderPtr& responder) {
    responder->Reply("restarted", false);
  });
  EXPECT_EQ(Call(Type::kPull).body(), "restarted");
}

TEST_F(RpcFixture, ARequestThatWasGivenUpIsNotDeliveredToALaterServer) {
  const std::string address = endpoint();
  StopServer();
  EXPECT_EQ(Call(Type::kPrefill, "first").status().code(), Code::kPeerUnreachable);
  StartServer(address);
  std::vector<std::string> seen;
  server().Handle(Type::kPrefill, [&](std::string_view body, const ResponderPtr& responder) {
    seen.emplace_back(body);
    responder->Reply("", false);
  });
  EXPECT_TRUE(Call(Type::kPrefill, "second").ok());
  EXPECT_EQ(seen, std::vector<std::string>{"second"});
}

TEST_F(RpcFixture, StreamedRepliesComeInOrder) {
  ResponderPtr kept;
  server().Handle(Type::kGenerate,
                  [&](std::string_view, ResponderPtr responder) { kept = std::move(responder); });
  std::string text;
  bool last = false;
  client().Call(endpoint(), Type::kGenerate, "", In(Millis(5000)),
                [&](const Result<std::string>& reply, bool more) {
                  ASSERT_TRUE(reply.has_value());
                  EXPECT_FALSE(last);
                  text += *reply;
                  last = !more;
                });
  ASSERT_TRUE(RunUntil([&] { return kept != nullptr; }));
  for (int i = 0; i < 100; ++i) kept->Reply(std::to_string(i % 10), true);
  ASSERT_TRUE(RunUntil([&] { return text.size() == 100; }));
  EXPECT_FALSE(last);
  kept->Reply("end", false);
  kept->Reply("after the end", true);
  ASSERT_TRUE(RunUntil([&] { return last; }));
  EXPECT_TRUE(text.ends_with("6789end")) << text;
}

TEST_F(RpcFixture, AbandonStopsTheCallbackAndTellsTheServer) {
  ResponderPtr kept;
  bool told = false;
  server().Handle(Type::kGenerate, [&](std::string_view, ResponderPtr responder) {
    kept = std::move(responder);
    kept->OnCancel([&] { told = true; });
    kept->Reply("one", true);
  });
  int replies = 0;
  Rpc::CallId id = 0;
  id = client().Call(endpoint(), Type::kGenerate, "", In(Millis(5000)),
                     [&](const Result<std::string>&, bool) {
                       ++replies;
                       client().Abandon(id);  // from inside its own callback
                     });
  ASSERT_TRUE(RunUntil([&] { return told; }));
  EXPECT_TRUE(kept->cancelled());
  kept->Reply("two", false);
  client().Abandon(id);
  client().Abandon(0);
  RunFor(Millis(10));
  EXPECT_EQ(replies, 1);

  bool late = false;
  kept->OnCancel([&] { late = true; });
  EXPECT_FALSE(late) << "never inside the call";
  EXPECT_TRUE(RunUntil([&] { return late; })) << "who asks after the fact is told too";
}

TEST_F(RpcFixture, AnAnsweredRequestIsNotCancelledLater) {
  ResponderPtr kept;
  bool told = false;
  server().Handle(Type::kPing, [&](std::string_view, ResponderPtr responder) {
    kept = responder;
    responder->OnCancel([&told, responder] { told = true; });  // also: holds itself, must not leak
    responder->Reply("", false);
  });
  ASSERT_TRUE(Call(Type::kPing).ok());
  StopClient();
  RunFor(Millis(20));
  EXPECT_FALSE(told);
  EXPECT_FALSE(kept->cancelled());
}

TEST_F(RpcFixture, AClientThatDisconnectsCancelsWhatItAskedFor) {
  ResponderPtr kept;
  bool told = false;
  server().Handle(Type::kGenerate, [&](std::string_view, ResponderPtr responder) {
    kept = std::move(responder);
    kept->OnCancel([&] { told = true; });
  });
  client().Call(endpoint(), Type::kGenerate, "", In(Millis(60'000)),
                [](const Result<std::string>&, bool) { FAIL() << "its Rpc is gone"; });
  ASSERT_TRUE(RunUntil([&] { return kept != nullptr; }));
  StopClient();
  EXPECT_TRUE(RunUntil([&] { return told; }));
}

TEST_F(RpcFixture, ADroppedRequestIsAnswered) {
  server().Handle(Type::kStart, [](std::string_view, const ResponderPtr&) {});
  EXPECT_EQ(Call(Type::kStart).status().ToString(),
            "kInternal: START was dropped without an answer");
}

TEST_F(RpcFixture, ATypeWithoutHandlerIsAnswered) {
  EXPECT_EQ(Call(Type::kDrop).status().ToString(),
            "kInvalidArgument: DROP is not answered at " + endpoint());
}

TEST_F(RpcFixture, AThousandCallsAtOnceAreAllAnswered) {
  std::vector<std::pair<std::string, ResponderPtr>> kept;
  server().Handle(Type::kPing, [&](std::string_view body, ResponderPtr responder) {
    kept.emplace_back(body, std::move(responder));
  });
  constexpr int kCalls = 1000;
  int right = 0;
  for (int i = 0; i < kCalls; ++i) {
    client().Call(endpoint(), Type::kPing, std::to_string(i), In(Millis(10'000)),
                  [&, i](const Result<std::string>& reply, bool) {
                    if (reply.has_value() && *reply == "answer " + std::to_string(i)) ++right;
                  });
  }
  ASSERT_TRUE(RunUntil([&] { return kept.size() == kCalls; }));
  // In the other order: ids tell the calls apart.
  while (!kept.empty()) {
    kept.back().second->Reply("answer " + kept.back().first, false);
    kept.pop_back();
  }
  EXPECT_TRUE(RunUntil([&] { return right == kCalls; }));
  EXPECT_EQ(client().connections(), 1U);
}

TEST_F(RpcFixture, AServerMayCallItself) {
  server().Handle(Type::kPing, [](std::string_view, const ResponderPtr& responder) {
    responder->Reply("self", false);
  });
  std::string answer;
  server().Call(endpoint(), Type::kPing, "", In(Millis(2000)),
                [&](const Result<std::string>& reply, bool) { answer = reply.value_or("failed"); });
  EXPECT_TRUE(RunUntil([&] { return answer == "self"; })) << answer;
}

TEST_F(RpcFixture, IdleConnectionsAreClosedAndMadeAgain) {
  ZmqRpc::Options options;
  options.idle_close = Millis(300);
  StartClient(options);
  server().Handle(Type::kPing, [](std::string_view, const ResponderPtr& responder) {
    responder->Reply("", false);
  });
  for (int i = 0; i < 2; ++i) {
    EXPECT_TRUE(Call(Type::kPing).ok());
    EXPECT_EQ(client().connections(), 1U);
    EXPECT_TRUE(RunUntil([&] { return client().connections() == 0; }));
  }
}

TEST_F(RpcFixture, APortThatIsTakenIsNamed) {
  ZmqRpc::Options options;
  options.listen = endpoint();
  const auto second = ZmqRpc::Create(loop(), counters(), options);
  ASSERT_FALSE(second.has_value());
  EXPECT_EQ(second.error().ToString(), "kInvalidArgument: cannot listen on " + endpoint() +
                                           ": port taken (Address already in use)");
  options.listen = "tcp://no.such.interface.invalid:0";
  const auto third = ZmqRpc::Create(loop(), counters(), options);
  ASSERT_FALSE(third.has_value());
  EXPECT_EQ(third.error().code(), Code::kInvalidArgument);
  EXPECT_TRUE(third.error().message().starts_with("cannot listen on tcp://no.such"))
      << third.error().message();
}

TEST_F(RpcFixture, ThePlainReqSocketOfAnybodyCanCall) {
  std::optional<std::string> body;
  server().Handle(Type::kPing, [&](std::string_view request, const ResponderPtr& responder) {
    body = request;
    responder->Reply("pong", false);
  });
  PlainSocket req(ZMQ_REQ, endpoint());
  req.Send({proto::EncodeEnvelope({Type::kPing, 42, false, 0, "hello"})});
  ASSERT_TRUE(RunUntil([&] { return body.has_value(); }));
  EXPECT_EQ(body, "hello");
  const std::vector<std::string> frames = ReceiveFrom(req);
  ASSERT_EQ(frames.size(), 1U);
  const auto reply = proto::DecodeEnvelope(frames[0]);
  ASSERT_TRUE(reply.has_value());
  EXPECT_EQ(reply->id, 42U);
  EXPECT_EQ(reply->type, Type::kOk);
  EXPECT_EQ(reply->body, "pong");
}

}  // namespace
}  // namespace kvrelay::agent
