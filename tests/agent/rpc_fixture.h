// A server and a client ZmqRpc on one loop, which the test's own thread runs.
#pragma once

#include <arpa/inet.h>
#include <gtest/gtest.h>
#include <netinet/in.h>
#include <sys/socket.h>
#include <zmq.h>

#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "agent/counters.h"
#include "agent/event_loop.h"
#include "agent/zmq_rpc.h"
#include "base/unique_fd.h"

namespace kvrelay::agent {

// A raw socket, as other people's programs have.
class PlainSocket {
 public:
  PlainSocket(int type, const std::string& endpoint, int queue_messages = 1000)
      : context_(zmq_ctx_new()), socket_(zmq_socket(context_, type)) {
    const int linger = 0;
    const int timeout_ms = 5000;
    zmq_setsockopt(socket_, ZMQ_LINGER, &linger, sizeof(linger));
    zmq_setsockopt(socket_, ZMQ_SNDTIMEO, &timeout_ms, sizeof(timeout_ms));
    zmq_setsockopt(socket_, ZMQ_RCVHWM, &queue_messages, sizeof(queue_messages));
    EXPECT_EQ(zmq_connect(socket_, endpoint.c_str()), 0);
  }
  ~PlainSocket() {
    zmq_close(socket_);
    zmq_ctx_term(context_);
  }
  PlainSocket(const PlainSocket&) = delete;
  PlainSocket& operator=(const PlainSocket&) = delete;

  void Send(const std::vector<std::string>& frames) {
    for (size_t i = 0; i < frames.size(); ++i) {
      const int more = i + 1 < frames.size() ? ZMQ_SNDMORE : 0;
      EXPECT_GE(zmq_send(socket_, frames[i].data(), frames[i].size(), more), 0)
          << zmq_strerror(zmq_errno());
    }
  }
  // Empty when no message waits.
  std::vector<std::string> Receive() {
    std::vector<std::string> frames;
    for (bool more = true; more;) {
      zmq_msg_t frame;
      zmq_msg_init(&frame);
      if (zmq_msg_recv(&frame, socket_, ZMQ_DONTWAIT) < 0) return {};
      frames.emplace_back(static_cast<const char*>(zmq_msg_data(&frame)), zmq_msg_size(&frame));
      more = zmq_msg_more(&frame) != 0;
      zmq_msg_close(&frame);
    }
    return frames;
  }

 private:
  void* context_;
  void* socket_;
};

// Listens, lets the kernel connect, and never speaks: a process that was stopped before anybody was
// connected to it.
class SilentListener {
 public:
  SilentListener() : fd_(socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0)) {
    sockaddr_in address{};
    address.sin_family = AF_INET;
    address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    socklen_t size = sizeof(address);
    EXPECT_EQ(bind(fd_.get(), reinterpret_cast<sockaddr*>(&address), size), 0);
    EXPECT_EQ(listen(fd_.get(), 8), 0);
    EXPECT_EQ(getsockname(fd_.get(), reinterpret_cast<sockaddr*>(&address), &size), 0);
    endpoint_ = "tcp://127.0.0.1:" + std::to_string(ntohs(address.sin_port));
  }
  const std::string& endpoint() const { return endpoint_; }

 private:
  const UniqueFd fd_;
  std::string endpoint_;
};

class RpcFixture : public testing::Test {
 protected:
  struct Outcome {
    std::optional<Result<std::string>> reply;
    Duration took{};
    bool ok() const { return reply && reply->has_value(); }
    std::string body() const { return ok() ? reply->value() : "no body: " + status().ToString(); }
    Status status() const {
      if (!reply) return {Code::kInternal, "the call did not end"};
      return ok() ? Status::Ok() : reply->error();
    }
  };

  RpcFixture() {
    StartServer("tcp://127.0.0.1:0");
    StartClient({});
  }

  void StartServer(const std::string& listen, ZmqRpc::Options options = {}) {
    server_.reset();
    options.listen = listen;
    auto rpc = ZmqRpc::Create(loop_, counters_, options);
    ASSERT_TRUE(rpc.has_value()) << rpc.error().ToString();
    server_ = *std::move(rpc);
    endpoint_ = server_->endpoint();
  }
  void StartClient(const ZmqRpc::Options& options) {
    auto rpc = ZmqRpc::Create(loop_, counters_, options);
    ASSERT_TRUE(rpc.has_value()) << rpc.error().ToString();
    client_ = *std::move(rpc);
  }
  void StopServer() { server_.reset(); }
  void StopClient() { client_.reset(); }

  // Runs the loop until `done` says so, which it is asked often; false after 10 s.
  bool RunUntil(const std::function<bool()>& done) {
    bool reached = false;
    const TimePoint end = loop_.Now() + Millis(10'000);
    std::function<void()> look = [&] {
      reached = done();
      if (reached || loop_.Now() >= end) return loop_.Stop();
      loop_.CallAfter(std::chrono::microseconds(200), look);
    };
    loop_.CallAt(loop_.Now(), look);
    loop_.Run();
    return reached;
  }
  void RunFor(Duration d) {
    loop_.CallAfter(d, [this] { loop_.Stop(); });
    loop_.Run();
  }

  // The next message to a raw socket.
  std::vector<std::string> ReceiveFrom(PlainSocket& socket) {
    std::vector<std::string> frames;
    EXPECT_TRUE(RunUntil([&] { return !(frames = socket.Receive()).empty(); }));
    return frames;
  }

  // One call of the client to the server, to its end.
  Outcome Call(proto::Type type, std::string body = {}, Duration timeout = Millis(5000)) {
    Outcome outcome;
    const TimePoint start = loop_.Now();
    client_->Call(endpoint_, type, std::move(body), start + timeout,
                  [&](Result<std::string> reply, bool more) {
                    EXPECT_FALSE(more);
                    EXPECT_FALSE(outcome.reply.has_value());
                    outcome.reply = std::move(reply);
                    outcome.took = loop_.Now() - start;
                  });
    RunUntil([&] { return outcome.reply.has_value(); });
    return outcome;
  }

  TimePoint In(Duration d) const { return loop_.Now() + d; }
  EventLoop& loop() { return loop_; }
  Counters& counters() { return counters_; }
  ZmqRpc& server() { return *server_; }
  ZmqRpc& client() { return *client_; }
  const std::string& endpoint() const { return endpoint_; }
  uint64_t BadMessages(const std::string& reason) const {
    return counters_.Get("kvrelay_bad_messages_total{reason=\"" + reason + "\"}");
  }

 private:
  EventLoop loop_;
  Counters counters_;
  std::unique_ptr<ZmqRpc> server_;
  std::unique_ptr<ZmqRpc> client_;
  std::string endpoint_;
};

}  // namespace kvrelay::agent
