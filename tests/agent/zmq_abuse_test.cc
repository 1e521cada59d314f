// Callers that break the rules or vanish: none of them may take the listener with it.
#include <arpa/inet.h>
#include <fcntl.h>
#include <gtest/gtest.h>
#include <netinet/in.h>
#include <spawn.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <unistd.h>

#include <csignal>
#include <cstdlib>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "agent/client.h"
#include "base/unique_fd.h"
#include "proto/codec.h"
#include "proto/envelope.h"
#include "tests/agent/rpc_fixture.h"

namespace kvrelay::agent {
namespace {

using proto::Type;

constexpr char kCallerVariable[] = "KVRELAY_TEST_CALL";

// Turns this binary into another process that calls the endpoint in the variable and waits for the
// answer.
class CallerProcess : public testing::Environment {
 public:
  void SetUp() override {
    const char* const endpoint = std::getenv(kCallerVariable);
    if (endpoint == nullptr) return;
    auto client = Client::Connect(endpoint);
    if (client) (void)client->Call(Type::kGenerate, "", Millis(60'000));
    _exit(0);
  }
};
const auto* const kCallerProcess = testing::AddGlobalTestEnvironment(new CallerProcess);

pid_t SpawnCaller(const std::string& endpoint) {
  std::string variable = std::string(kCallerVariable) + "=" + endpoint;
  std::vector<char*> environment = {variable.data()};
  for (char** inherited = environ; *inherited != nullptr; ++inherited) {
    environment.push_back(*inherited);  // sanitizer options
  }
  environment.push_back(nullptr);
  std::string program = "/proc/self/exe";
  std::string filter = "--gtest_filter=EventLoop.*";
  std::vector<char*> arguments = {program.data(), filter.data(), nullptr};
  posix_spawn_file_actions_t actions;
  posix_spawn_file_actions_init(&actions);
  posix_spawn_file_actions_addopen(&actions, STDOUT_FILENO, "/dev/null", O_WRONLY, 0);
  pid_t pid = -1;
  const int rc =
      posix_spawn(&pid, program.c_str(), &actions, nullptr, arguments.data(), environment.data());
  posix_spawn_file_actions_destroy(&actions);
  EXPECT_EQ(rc, 0);
  return pid;
}

void KillAndReap(pid_t pid) {
  kill(pid, SIGKILL);
  waitpid(pid, nullptr, 0);
}

class Abuse : public RpcFixture {
 protected:
  Abuse() { AnswerPing(); }
  void AnswerPing() {
    server().Handle(Type::kPing, [](std::string_view body, const ResponderPtr& responder) {
      responder->Reply(std::string(body), false);
    });
  }
  void KeepGenerate() {
    server().Handle(Type::kGenerate, [this](std::string_view, ResponderPtr responder) {
      responder->OnCancel([this] { cancelled_at = loop().Now(); });
      kept = std::move(responder);
    });
  }
  void ExpectAlive() { EXPECT_EQ(Call(Type::kPing, "alive").body(), "alive"); }

  // Sends `frames` and returns the Error that comes back; kOk when none does.
  Status SendBad(PlainSocket& dealer, const std::vector<std::string>& frames) {
    dealer.Send(frames);
    const std::vector<std::string> reply = ReceiveFrom(dealer);
    if (reply.size() != 2) return Status::Ok();
    const auto envelope = proto::DecodeEnvelope(reply[1]);
    if (!envelope || envelope->type != Type::kError) return Status::Ok();
    const auto error = proto::Decode<proto::Error>(envelope->body);
    return error ? Status(error->code, error->message) : Status::Ok();
  }

  ResponderPtr kept;
  TimePoint cancelled_at{};
};

// {"v":[major,0],"t":type,"id":9,"more":false,"timeout_ms":0,"b":b""}
std::string EnvelopeBytes(char major, const std::string& type) {
  return std::string("\x86\xa1v\x92", 4) + major + std::string("\0\xa1t", 3) +
         static_cast<char>(0xa0 + type.size()) + type + "\xa2id\x09\xa4more\xc2\xaatimeout_ms" +
         std::string(
             "\0\xa1"
             "b\xc4\0",
             5);
}

TEST_F(Abuse, BadRequestsAreAnsweredWhereThereIsAnId) {
  PlainSocket dealer(ZMQ_DEALER, endpoint());
  const std::string good = EnvelopeBytes(1, "PING");
  dealer.Send({"", good});
  ASSERT_EQ(ReceiveFrom(dealer).size(), 2U)
      << "the bytes below differ from a good request only there";

  EXPECT_EQ(SendBad(dealer, {"", EnvelopeBytes(2, "PING")}).ToString(),
            "kIncompatible: the peer speaks protocol 2.0, we speak 1.0");
  EXPECT_EQ(BadMessages("version"), 1U);
  EXPECT_EQ(SendBad(dealer, {"", EnvelopeBytes(1, "DANCE")}).ToString(),
            "kInvalidArgument: envelope: unknown message type 'DANCE'");
  EXPECT_EQ(SendBad(dealer, {"", EnvelopeBytes(1, "OK")}).ToString(),
            "kInvalidArgument: OK is not answered at " + endpoint());
  EXPECT_EQ(BadMessages("type"), 2U);
  EXPECT_EQ(SendBad(dealer, {good}).ToString(),
            "kInvalidArgument: 1 frames; a request is an empty one and an envelope");
  EXPECT_EQ(SendBad(dealer, {"not empty", good}).code(), Code::kInvalidArgument);
  EXPECT_EQ(SendBad(dealer, {"", good, "one too many"}).ToString(),
            "kInvalidArgument: 3 frames; a request is an empty one and an envelope");
  EXPECT_EQ(BadMessages("frames"), 3U);
  ExpectAlive();
}

TEST_F(Abuse, AStormOfGarbageThenAGoodRequest) {
  const char* const given = std::getenv("KVRELAY_SEED");
  const uint64_t seed =
      given != nullptr ? std::strtoull(given, nullptr, 10) : std::random_device{}();
  SCOPED_TRACE("KVRELAY_SEED=" + std::to_string(seed));
  std::mt19937_64 random(seed);
  const std::string good = proto::EncodeEnvelope({Type::kPing, 7, false, 1000, "body"});
  constexpr int kRounds = 5;
  constexpr int kMessages = 1000;
  int ends = 0;
  server().Handle(Type::kHealth, [&](std::string_view, const ResponderPtr& responder) {
    ++ends;
    responder->Reply("", false);
  });
  for (int round = 0; round < kRounds; ++round) {
    PlainSocket dealer(ZMQ_DEALER, endpoint());
    for (int i = 0; i < kMessages; ++i) {
      std::vector<std::string> frames(1 + random() % 4);
      for (std::string& frame : frames) {
        switch (random() % 4) {
          case 0:
            break;  // empty
          case 1:
            frame = good;
            frame[random() % frame.size()] = static_cast<char>(random());
            break;
          case 2:
            frame = good.substr(0, random() % good.size());
            break;
          default:
            frame.resize(random() % 64);
            for (char& c : frame) c = static_cast<char>(random());
        }
      }
      if (random() % 2 == 0) frames.insert(frames.begin(), "");
      dealer.Send(frames);
    }
    dealer.Send({"", proto::EncodeEnvelope({Type::kHealth, 8, false, 1000, ""})});
    ASSERT_TRUE(RunUntil([&] { return ends == round + 1; }));
  }
  ExpectAlive();
  const uint64_t counted = BadMessages("frames") + BadMessages("malformed") + BadMessages("type") +
                           BadMessages("version") + BadMessages("duplicate");
  EXPECT_GT(counted, kRounds * kMessages * 9 / 10) << "each bad message counts";
}

TEST_F(Abuse, BytesThatAreNotZeroMqCloseTheirConnectionOnly) {
  const int port = std::stoi(endpoint().substr(endpoint().rfind(':') + 1));
  std::mt19937_64 random(1);
  for (int i = 0; i < 50; ++i) {
    const UniqueFd fd(socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0));
    sockaddr_in address{};
    address.sin_family = AF_INET;
    address.sin_port = htons(static_cast<uint16_t>(port));
    address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    ASSERT_EQ(connect(fd.get(), reinterpret_cast<sockaddr*>(&address), sizeof(address)), 0);
    std::string bytes(1 + random() % 300, '\0');
    for (char& c : bytes) c = static_cast<char>(random());
    // Some begin like ZMTP 3.
    if (i % 2 == 0) bytes = std::string("\xff\0\0\0\0\0\0\0\1\x7f\3\0", 12) + bytes;
    (void)!send(fd.get(), bytes.data(), bytes.size(), MSG_NOSIGNAL);
  }
  ASSERT_TRUE(RunUntil([&] { return BadMessages("handshake") > 0; }));
  ExpectAlive();
}

TEST_F(Abuse, AMessageOf100MegabytesCostsItsSenderTheConnection) {
  {
    PlainSocket dealer(ZMQ_DEALER, endpoint());
    std::string long_message;
    long_message.resize(100'000'000, 'x');
    dealer.Send({"", std::move(long_message)});
    RunFor(Millis(100));
    ExpectAlive();
  }
  ExpectAlive();
}

TEST_F(Abuse, AnIdThatIsInUseIsNotServedTwice) {
  KeepGenerate();
  PlainSocket dealer(ZMQ_DEALER, endpoint());
  const std::string request = proto::EncodeEnvelope({Type::kGenerate, 5, false, 0, ""});
  dealer.Send({"", request});
  ASSERT_TRUE(RunUntil([&] { return kept != nullptr; }));
  const Responder* const first = kept.get();
  dealer.Send({"", request});
  ASSERT_TRUE(RunUntil([&] { return BadMessages("duplicate") == 1; }));
  EXPECT_EQ(kept.get(), first);
  // Only its own caller can cancel a call.
  PlainSocket other(ZMQ_DEALER, endpoint());
  other.Send({"", proto::EncodeEnvelope({Type::kCancelCall, 5, false, 0, ""})});
  RunFor(Millis(20));
  EXPECT_FALSE(kept->cancelled());
  dealer.Send({"", proto::EncodeEnvelope({Type::kCancelCall, 5, false, 0, ""})});
  EXPECT_TRUE(RunUntil([&] { return kept->cancelled(); }));
}

TEST_F(Abuse, ACallerThatDoesNotReadItsAnswersIsCutOff) {
  ZmqRpc::Options options;
  options.socket.queue_messages = 4;
  StartServer("tcp://127.0.0.1:0", options);
  KeepGenerate();
  AnswerPing();
  PlainSocket dealer(ZMQ_DEALER, endpoint(), /*queue_messages=*/1);
  dealer.Send({"", proto::EncodeEnvelope({Type::kGenerate, 5, false, 0, ""})});
  ASSERT_TRUE(RunUntil([&] { return kept != nullptr; }));
  const std::string large(1 << 20, 'x');
  for (int i = 0; i < 4000 && !kept->cancelled(); ++i) kept->Reply(large, true);
  EXPECT_TRUE(kept->cancelled()) << "not 4 GB later";
  EXPECT_TRUE(RunUntil([&] { return cancelled_at != TimePoint{}; }));
  ExpectAlive();
}

TEST_F(Abuse, AKilledCallerIsNoticed) {
  KeepGenerate();
  const pid_t caller = SpawnCaller(endpoint());
  ASSERT_TRUE(RunUntil([&] { return kept != nullptr; }));
  const TimePoint killed = loop().Now();
  KillAndReap(caller);
  ASSERT_TRUE(RunUntil([&] { return kept->cancelled(); }));
  EXPECT_LT(cancelled_at - killed, Millis(2000));
  kept->Reply("nobody listens", false);
  ExpectAlive();
}

TEST_F(Abuse, AStoppedCallerIsNoticed) {
  ZmqRpc::Options options;
  options.socket.heartbeat = Millis(100);
  options.socket.silence = Millis(800);
  StartServer("tcp://127.0.0.1:0", options);
  KeepGenerate();
  const pid_t caller = SpawnCaller(endpoint());
  ASSERT_TRUE(RunUntil([&] { return kept != nullptr; }));
  RunFor(Millis(1100));
  EXPECT_FALSE(kept->cancelled()) << "waiting is not being dead";
  kill(caller, SIGSTOP);
  EXPECT_TRUE(RunUntil([&] { return kept->cancelled(); }));
  KillAndReap(caller);
}

TEST_F(Abuse, AStoppedServerFailsCallsBeforeTheirDeadline) {
  const SilentListener silent;
  ZmqRpc::Options options;
  options.socket.handshake = Millis(200);
  StartClient(options);
  Status status;
  client().Call(silent.endpoint(), Type::kPing, "", In(Millis(60'000)),
                [&](const Result<std::string>& reply, bool) { status = reply.error(); });
  ASSERT_TRUE(RunUntil([&] { return !status.ok(); }));
  EXPECT_EQ(status.code(), Code::kPeerUnreachable);
}

TEST_F(Abuse, DescriptorsThatAreUsedAgainCancelNobodyElse) {
  // A caller leaves and another gets its descriptor at once: the news of the first must not hit the
  // second.
  std::vector<ResponderPtr> all;
  server().Handle(Type::kGenerate, [&](std::string_view, ResponderPtr responder) {
    all.push_back(std::move(responder));
  });
  const std::string request = proto::EncodeEnvelope({Type::kGenerate, 5, false, 0, ""});
  constexpr int kRounds = 50;
  for (int i = 0; i < kRounds; ++i) {
    {
      PlainSocket leaver(ZMQ_DEALER, endpoint());
      leaver.Send({"", proto::EncodeEnvelope({Type::kPing, 1, false, 0, ""})});
      // Not read by the server's loop yet when the connection ends, or just.
      if (i % 2 == 0) RunFor(Millis(1));
    }
    const size_t before = all.size();
    PlainSocket stayer(ZMQ_DEALER, endpoint());
    stayer.Send({"", request});
    ASSERT_TRUE(RunUntil([&] { return all.size() == before + 1; }));
    RunFor(Millis(1));
    ASSERT_FALSE(all.back()->cancelled()) << "round " << i;
  }
  EXPECT_TRUE(RunUntil([&] {
    for (const auto& responder : all) {
      if (!responder->cancelled()) return false;
    }
    return true;
  })) << "all have left by now";
}

}  // namespace
}  // namespace kvrelay::agent
