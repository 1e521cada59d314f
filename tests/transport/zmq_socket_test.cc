#include "transport/zmq_socket.h"

#include <gtest/gtest.h>

#include <chrono>
#include <memory>
#include <optional>
#include <string>
#include <thread>

#include "tests/common/slowness.h"

namespace kvrelay::transport {
namespace {

constexpr ZmqSocketOptions kQuick = {.heartbeat = Millis(20),
                                     .silence = Millis(1000) * tests::Slowness()};

Result<ZmqSocket> Create(int type, const ZmqSocketOptions& options) {
  return ZmqSocket::Create(std::make_shared<ZmqContext>(), type, options);
}

size_t ReceiveFor(ZmqSocket& socket, Duration time) {
  size_t messages = 0;
  const TimePoint end = std::chrono::steady_clock::now() + time;
  while (std::chrono::steady_clock::now() < end) {
    if (socket.Receive()) {
      ++messages;
    } else {
      std::this_thread::sleep_for(Millis(1));
    }
  }
  return messages;
}

// libzmq would abort this process at a ping that falls due then.
TEST(ZmqSocket, AFloodWhoseSenderGoesAwayUnreadIsNoTrouble) {
  ZmqSocketOptions narrow = kQuick;
  narrow.receive_queue = 2;
  narrow.silence = std::chrono::seconds(10);
  auto listener = Create(ZMQ_ROUTER, narrow);
  ASSERT_TRUE(listener.has_value()) << listener.error().ToString();
  const auto endpoint = listener->Bind("tcp://127.0.0.1:*");
  ASSERT_TRUE(endpoint.has_value()) << endpoint.error().ToString();
  const std::string large(1 << 20, 'k');
  {
    auto flood = Create(ZMQ_DEALER, kQuick);
    ASSERT_TRUE(flood.has_value()) << flood.error().ToString();
    ASSERT_TRUE(flood->Connect(*endpoint).ok());
    for (int i = 0; i < 20; ++i) ASSERT_TRUE(flood->Send({large}));
    std::this_thread::sleep_for(Millis(300));
  }
  std::this_thread::sleep_for(Millis(500));
  ReceiveFor(*listener, Millis(300));

  auto another = Create(ZMQ_DEALER, kQuick);
  ASSERT_TRUE(another.has_value()) << another.error().ToString();
  ASSERT_TRUE(another->Connect(*endpoint).ok());
  ASSERT_TRUE(another->Send({"hello"}));
  EXPECT_EQ(ReceiveFor(*listener, std::chrono::seconds(1)), 1U);
}

// Held back by TCP it would not see the answers to its pings either, and count the peer as silent.
TEST(ZmqSocket, WhoDialedAndDoesNotReadForAWhileGetsAllAfterwards) {
  auto listener = Create(ZMQ_ROUTER, kQuick);
  ASSERT_TRUE(listener.has_value()) << listener.error().ToString();
  const auto endpoint = listener->Bind("tcp://127.0.0.1:*");
  ASSERT_TRUE(endpoint.has_value()) << endpoint.error().ToString();
  ZmqSocketOptions narrow = kQuick;
  narrow.receive_queue = 2;
  auto dialer = Create(ZMQ_DEALER, narrow);
  ASSERT_TRUE(dialer.has_value()) << dialer.error().ToString();
  ASSERT_TRUE(dialer->Connect(*endpoint).ok());
  ASSERT_TRUE(dialer->Send({"all, please"}));
  const TimePoint patience = std::chrono::steady_clock::now() + std::chrono::seconds(60);
  std::optional<ZmqMessage> asked;
  while (!asked && std::chrono::steady_clock::now() < patience) asked = listener->Receive();
  ASSERT_TRUE(asked.has_value());
  const std::string large(1 << 20, 'k');
  constexpr size_t kAnswers = 50;
  for (size_t i = 0; i < kAnswers; ++i) ASSERT_TRUE(listener->Send({asked->frames[0], large}));
  std::this_thread::sleep_for(kQuick.silence + kQuick.silence / 2);
  size_t got = 0;
  while (got < kAnswers && std::chrono::steady_clock::now() < patience) {
    got += ReceiveFor(*dialer, Millis(10));
  }
  EXPECT_EQ(got, kAnswers);
}

}  // namespace
}  // namespace kvrelay::transport
