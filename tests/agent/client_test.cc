#include "agent/client.h"

#include <gtest/gtest.h>

#include <atomic>
#include <memory>
#include <thread>
#include <vector>

#include "agent/counters.h"
#include "agent/event_loop.h"
#include "agent/zmq_rpc.h"

namespace kvrelay::agent {
namespace {

using proto::Type;

// A daemon's control thread with handlers that echo, stream (to an end unless the body says
// "endless"), or never answer.
class ServerThread {
 public:
  explicit ServerThread(const std::string& listen = "tcp://127.0.0.1:0") {
    ZmqRpc::Options options;
    options.listen = listen;
    auto rpc = ZmqRpc::Create(loop_, counters_, options);
    EXPECT_TRUE(rpc.has_value());
    rpc_ = *std::move(rpc);
    endpoint_ = rpc_->endpoint();
    rpc_->Handle(Type::kPing, [](std::string_view body, const ResponderPtr& responder) {
      responder->Reply(std::string(body), false);
    });
    rpc_->Handle(Type::kPrefill, [this](std::string_view, ResponderPtr responder) {
      responder->OnCancel([this] { ++cancelled; });
      kept_.push_back(std::move(responder));
      ++waiting;
    });
    rpc_->Handle(Type::kGenerate, [this](std::string_view body, ResponderPtr responder) {
      responder->OnCancel([this] { ++cancelled; });
      for (int i = 0; i < 5; ++i) responder->Reply(std::to_string(i), true);
      if (body != "endless") responder->Reply("end", false);
      kept_.push_back(std::move(responder));
    });
    thread_ = std::thread([this] { loop_.Run(); });
  }
  ~ServerThread() {
    loop_.Stop();
    thread_.join();
  }

  const std::string& endpoint() const { return endpoint_; }
  std::atomic<int> waiting{0};
  std::atomic<int> cancelled{0};

 private:
  EventLoop loop_;
  Counters counters_;
  std::string endpoint_;
  std::unique_ptr<ZmqRpc> rpc_;
  std::vector<ResponderPtr> kept_;
  std::thread thread_;
};

bool Soon(const std::function<bool()>& done) {
  const auto end = std::chrono::steady_clock::now() + std::chrono::seconds(10);
  while (!done()) {
    if (std::chrono::steady_clock::now() > end) return false;
    std::this_thread::sleep_for(Millis(1));
  }
  return true;
}

Client ConnectTo(const std::string& endpoint) {
  auto client = Client::Connect(endpoint);
  EXPECT_TRUE(client.has_value());
  return *std::move(client);
}

TEST(Client, CallsAgainAndAgain) {
  const ServerThread server;
  Client client = ConnectTo(server.endpoint());
  for (int i = 0; i < 100; ++i) {
    const auto reply = client.Call(Type::kPing, std::to_string(i), Millis(5000));
    ASSERT_TRUE(reply.has_value()) << reply.error().ToString();
    EXPECT_EQ(*reply, std::to_string(i));
  }
}

TEST(Client, GetsStreamedRepliesThenTheLast) {
  const ServerThread server;
  Client client = ConnectTo(server.endpoint());
  std::string text;
  const auto last = client.Stream(Type::kGenerate, "", Millis(5000), [&](std::string_view part) {
    text += part;
    return Status::Ok();
  });
  ASSERT_TRUE(last.has_value()) << last.error().ToString();
  EXPECT_EQ(text + *last, "01234end");
}

TEST(Client, AFailingCallbackEndsTheCallOnBothSides) {
  const ServerThread server;
  Client client = ConnectTo(server.endpoint());
  int parts = 0;
  const auto last = client.Stream(Type::kGenerate, "endless", Millis(5000), [&](std::string_view) {
    return ++parts < 2 ? Status::Ok() : Status(Code::kInvalidArgument, "not like this");
  });
  EXPECT_EQ(last.error().ToString(), "kInvalidArgument: not like this");
  EXPECT_EQ(parts, 2);
  EXPECT_TRUE(Soon([&] { return server.cancelled == 1; }));
  EXPECT_TRUE(client.Call(Type::kPing, "", Millis(5000)).has_value()) << "the client lives on";
}

TEST(Client, InterruptEndsTheCallOnBothSides) {
  const ServerThread server;
  Client client = ConnectTo(server.endpoint());
  std::thread signal([&] {
    EXPECT_TRUE(Soon([&] { return server.waiting == 1; }));
    client.Interrupt();
  });
  const auto reply = client.Call(Type::kPrefill, "", Millis(30'000));
  signal.join();
  ASSERT_FALSE(reply.has_value());
  EXPECT_EQ(reply.error().ToString(), "kCancelled: interrupted");
  EXPECT_TRUE(Soon([&] { return server.cancelled == 1; }));
  EXPECT_TRUE(client.Call(Type::kPing, "", Millis(5000)).has_value());

  client.Interrupt();  // between two calls: the next one
  EXPECT_EQ(client.Call(Type::kPrefill, "", Millis(30'000)).error().code(), Code::kCancelled);
}

TEST(Client, ConnectsAgainWhenItsIdleConnectionBroke) {
  auto server = std::make_unique<ServerThread>();
  const std::string endpoint = server->endpoint();
  Client client = ConnectTo(endpoint);
  EXPECT_TRUE(client.Call(Type::kPing, "", Millis(5000)).has_value());
  server.reset();
  server = std::make_unique<ServerThread>(endpoint);
  std::this_thread::sleep_for(Millis(50));  // the end of the old connection has arrived
  const auto reply = client.Call(Type::kPing, "again", Millis(5000));
  ASSERT_TRUE(reply.has_value()) << reply.error().ToString();
  EXPECT_EQ(*reply, "again");
}

TEST(Client, MayGoFromThreadToThread) {
  const ServerThread server;
  Client client = ConnectTo(server.endpoint());
  const auto call = [&] { EXPECT_TRUE(client.Call(Type::kPing, "", Millis(5000)).has_value()); };
  std::thread(call).join();
  std::thread(call).join();
  call();
}

TEST(Client, LeavingCancelsToo) {
  const ServerThread server;
  {
    Client client = ConnectTo(server.endpoint());
    EXPECT_EQ(client.Call(Type::kPrefill, "", Millis(50)).error().code(), Code::kDeadlineExceeded);
  }
  EXPECT_TRUE(Soon([&] { return server.cancelled == 1; }));
}

TEST(Client, SaysWhatIsWrongWithAnEndpoint) {
  for (const char* bad : {"", "127.0.0.1:7600", "tcp://127.0.0.1", "tcp://:7600", "tcp://host:"}) {
    const auto client = Client::Connect(bad);
    ASSERT_FALSE(client.has_value()) << bad;
    EXPECT_EQ(client.error().ToString(),
              "kInvalidArgument: '" + std::string(bad) + "' is not an endpoint: tcp://HOST:PORT");
  }
}

TEST(Client, ManyClientsAtOnce) {
  const ServerThread server;
  std::vector<std::thread> threads;
  std::atomic<int> right{0};
  for (int t = 0; t < 8; ++t) {
    threads.emplace_back([&, t] {
      Client client = ConnectTo(server.endpoint());
      for (int i = 0; i < 50; ++i) {
        const std::string body = std::to_string(t) + " " + std::to_string(i);
        const auto reply = client.Call(Type::kPing, body, Millis(10'000));
        if (reply.has_value() && *reply == body) ++right;
      }
    });
  }
  for (auto& thread : threads) thread.join();
  EXPECT_EQ(right, 8 * 50);
}

}  // namespace
}  // namespace kvrelay::agent
