// Requests that begin alike: the KV of that crosses once.
#include <thread>

#include "agent/client.h"
#include "proto/codec.h"
#include "tests/integration/generator.h"
#include "tests/integration/harness.h"

namespace kvrelay::integration {
namespace {

constexpr uint64_t kTokenBytes = 6 * 2 * 4 * 32 * 4;  // layers, K and V, KV heads, head_dim, fp32

class Sharing : public Story {
 protected:
  static std::vector<proto::Generate> Sixteen() {
    std::vector<proto::Generate> requests;
    for (size_t i = 0; i < 16; ++i) requests.push_back(Greedy(Text(256, 1), Text(20 + i, i), 24));
    return requests;
  }
};

TEST_F(Sharing, SixteenRequestsPullTheirSystemPromptOnce) {
  Daemon& prefill = StartPrefill({"--tp=2"});
  Daemon& with = StartDecode({&prefill}, {"--relay=on"});
  Daemon& without = StartDecode({&prefill}, {"--relay=off"});
  const std::vector<proto::Generate> requests = Sixteen();
  const auto replies = AskAll(with.endpoint(), requests, 16);
  const auto plain = AskAll(without.endpoint(), requests, 16);
  const auto expected = Reference(BundledModel()).Generate(requests);
  uint64_t prefix_bytes = 0;
  int hits = 0;
  for (size_t i = 0; i < requests.size(); ++i) {
    ASSERT_TRUE(replies[i].has_value()) << replies[i].error().ToString();
    ASSERT_TRUE(plain[i].has_value()) << plain[i].error().ToString();
    EXPECT_EQ(replies[i]->token_ids, expected[i]);
    EXPECT_EQ(plain[i]->token_ids, expected[i]);
    const nlohmann::json& kv = replies[i]->summary["kv"];
    EXPECT_EQ(kv["bytes_pulled"], requests[i].token_ids.size() * kTokenBytes);
    EXPECT_EQ(kv["prefix_tokens"], 256);
    EXPECT_EQ(replies[i]->summary["relay"], "on");
    EXPECT_EQ(plain[i]->summary["relay"], "off");
    prefix_bytes += kv["prefix_bytes_pulled"].get<uint64_t>();
    hits += kv["prefix_hit"].get<bool>() ? 1 : 0;
  }
  EXPECT_EQ(prefix_bytes, 256 * kTokenBytes);
  EXPECT_EQ(hits, 15);
  const Json counters = Inspect(with)["counters"];
  EXPECT_EQ(counters["kvrelay_pull_bytes_total{path=\"mapped\",kind=\"prefix\"}"],
            256 * kTokenBytes);
  for (Daemon* daemon : {&prefill, &with, &without}) ExpectIdle(*daemon);
}

// Nobody names a system prompt: what the prompts have in common is found, on two levels.
TEST_F(Sharing, PromptsThatBeginAlikePullTheirStartOnceWithoutNamingIt) {
  std::vector<proto::Generate> requests;
  for (size_t i = 0; i < 12; ++i) {
    std::vector<uint32_t> prompt = Text(256, 1);
    for (const uint32_t id : Text(96, 2 + i % 3)) prompt.push_back(id);
    for (const uint32_t id : Text(5 + i, 20 + i)) prompt.push_back(id);
    requests.push_back(Greedy({}, prompt, 48));
  }
  const auto expected = Reference(BundledModel()).Generate(requests);
  Daemon& prefill = StartPrefill({"--tp=2", "--block_size=8"});
  uint64_t prompt_bytes = 0;
  for (const proto::Generate& request : requests) {
    prompt_bytes += request.token_ids.size() * kTokenBytes;
  }
  for (const std::string relay : {"on", "off", "auto"}) {
    SCOPED_TRACE("relay " + relay);
    Daemon& decode = StartDecode({&prefill}, {"--relay=" + relay});
    const auto replies = AskAll(decode.endpoint(), requests, 12);
    uint64_t pulled = 0;
    for (size_t i = 0; i < requests.size(); ++i) {
      ASSERT_TRUE(replies[i].has_value()) << replies[i].error().ToString();
      EXPECT_EQ(replies[i]->token_ids, expected[i]);
      const nlohmann::json& kv = replies[i]->summary["kv"];
      pulled += kv["bytes_pulled"].get<uint64_t>() + kv["prefix_bytes_pulled"].get<uint64_t>();
      if (relay == "off") {
        EXPECT_EQ(replies[i]->summary["relay"], "off");
      }
    }
    // Who comes first does not know of the others, perhaps not the second either.
    EXPECT_LT(pulled, prompt_bytes / 2);
    const Json counters = Inspect(decode)["counters"];
    EXPECT_GE(counters["kvrelay_prefixes_found_total"], 8);
    ExpectIdle(decode);
    decode.Kill();
  }
  ExpectIdle(prefill);
}

TEST_F(Sharing, TheFirstRequestIsCancelledWhileItsSystemPromptIsUnderWay) {
  Daemon& prefill = StartPrefill({"--prefill_chunk=16"});
  Daemon& decode = StartDecode({&prefill});
  const std::vector<proto::Generate> requests = Sixteen();
  const auto expected = Reference(BundledModel()).Generate(requests);
  for (int round = 0; round < 5; ++round) {
    // Every round has a system prompt of its own, so that it has to be fetched anew.
    std::vector<proto::Generate> fresh = requests;
    for (proto::Generate& request : fresh) request.system_ids[0] = 3 + 'A' + round;
    proto::Generate first = fresh[0];
    first.request_id = "first";
    Result<agent::Client> client = agent::Client::Connect(decode.endpoint());
    ASSERT_TRUE(client.has_value());
    std::thread impatient([&] {
      const auto cancelled =
          client->Stream(proto::Type::kGenerate, proto::Encode(first), Millis(60'000),
                         [](std::string_view) { return Status::Ok(); });
      // It may have been quicker.
      if (!cancelled.has_value()) {
        EXPECT_EQ(cancelled.error().code(), Code::kCancelled);
      }
    });
    std::thread leaves([&] {
      std::this_thread::sleep_for(Millis(5 + 15 * round));
      client->Interrupt();
    });
    const auto replies = AskAll(decode.endpoint(), {fresh.begin() + 1, fresh.begin() + 9}, 8);
    impatient.join();
    leaves.join();
    uint64_t prefix_bytes = 0;
    for (const auto& reply : replies) {
      ASSERT_TRUE(reply.has_value()) << reply.error().ToString();
      EXPECT_EQ(reply->token_ids.size(), 24U);
      prefix_bytes += reply->summary["kv"]["prefix_bytes_pulled"].get<uint64_t>();
    }
    EXPECT_LE(prefix_bytes, 256 * kTokenBytes) << "at most one of those that stayed pulled it";
  }
  const auto after = Ask(decode.endpoint(), requests[3]);
  ASSERT_TRUE(after.has_value()) << after.error().ToString();
  EXPECT_EQ(after->token_ids, expected[3]);
  ExpectIdle(prefill);
  ExpectIdle(decode);
}

TEST_F(Sharing, TheLeastRecentlyUsedSystemPromptGoesAtTheHundredAndFirst) {
  Daemon& prefill = StartPrefill();
  Daemon& decode = StartDecode({&prefill}, {"--max_cached_system_prompts=100"});
  const auto with_system = [](uint32_t n) {
    std::vector<uint32_t> system = Text(16, 2);
    system[0] = 3 + 32 + n % 90;
    system[1] = 3 + 32 + n / 90;
    return Greedy(system, Text(4, 1), 1);
  };
  std::vector<proto::Generate> requests;
  for (uint32_t n = 0; n < 100; ++n) requests.push_back(with_system(n));
  for (const auto& reply : AskAll(decode.endpoint(), requests, 1)) {
    ASSERT_TRUE(reply.has_value()) << reply.error().ToString();
    EXPECT_FALSE(reply->summary["kv"]["prefix_hit"].get<bool>());
  }
  EXPECT_EQ(Inspect(decode)["prefixes"].size(), 100U);
  const auto hit = [&](uint32_t n) {
    const auto reply = Ask(decode.endpoint(), with_system(n));
    EXPECT_TRUE(reply.has_value());
    return reply.has_value() && reply->summary["kv"]["prefix_hit"].get<bool>();
  };
  EXPECT_TRUE(hit(0));     // now number 1 is the least recently used
  EXPECT_FALSE(hit(100));  // the hundred and first
  EXPECT_EQ(Inspect(decode)["prefixes"].size(), 100U);
  EXPECT_TRUE(hit(0));
  EXPECT_TRUE(hit(2));
  EXPECT_FALSE(hit(1)) << "the one that had to go";
  ExpectIdle(decode);
}

}  // namespace
}  // namespace kvrelay::integration
