// kill -9 of a prefill daemon before, during and after a pull; alone and one of two; and a new one
// at the old address.
#include <gmock/gmock.h>

#include <cstdlib>
#include <optional>
#include <thread>

#include "tests/integration/failure_story.h"

namespace kvrelay::integration {
namespace {

using ::testing::HasSubstr;

constexpr const char* kPacked = "--transport=ucx-packed";
constexpr const char* kNoPrefixes = "--max_cached_system_prompts=0";

class PrefillKilled : public FailureStory {
 protected:
  // Nearly all of it is system prompt, which the prefill daemon keeps and the decode daemon
  // (without a cache) pulls again for every request: many large pulls in a short time.
  static Args AskForALargePull() {
    Args ask = Ask(1800, 8);
    ask[0].replace(0, std::string("--prompt").size(), "--system");
    ask.emplace_back("--prompt=What now?");
    return ask;
  }

  // Asks until a pull is caught in the middle: its prefill daemon is frozen, and the pull does not
  // end. Returns that daemon; the asking command is left in `asking`.
  Daemon* FreezeInTheMiddleOfAPull(const Daemon& decode, const std::vector<Daemon*>& prefills,
                                   std::optional<RunningCli>& asking) {
    constexpr int kAttempts = 50;
    const Args ask = AskForALargePull();
    for (int attempt = 0; attempt < kAttempts; ++attempt) {
      asking.emplace(StartGenerate(decode, ask));
      while (asking->running()) {
        const std::string peer = ReadsFrom(decode);
        for (Daemon* prefill : prefills) {
          if (prefill->endpoint() != peer) continue;
          prefill->Freeze();
          std::this_thread::sleep_for(std::chrono::milliseconds(100));
          if (!ReadsFrom(decode).empty()) return prefill;
          prefill->Thaw();  // all its bytes had left already
        }
      }
      ExpectRightAnswer(asking->Wait(), ask);
    }
    ADD_FAILURE() << "no pull was caught in the middle in " << kAttempts << " attempts";
    return nullptr;
  }
};

TEST_F(PrefillKilled, BeforeThePullTheErrorNamesIt) {
  Daemon& prefill = StartPrefill();
  Daemon& decode = StartDecode({&prefill});
  ExpectServes(decode);
  prefill.Kill();
  const CliResult result = RunGenerate(decode, Ask(100, 8), {"--timeout_ms=10000"});
  ExpectFailure(result, 3, "kPeerUnreachable");
  EXPECT_THAT(Message(result), HasSubstr(prefill.endpoint()));
  EXPECT_LT(result.ms, 10'000 * Slowness());
  Eventually("health says that there is no prefill", [&] {
    return Cli({"health", decode.endpoint()}).exit_code == 5;
  });
  EXPECT_EQ(Cli({"health", decode.endpoint(), "--live"}).exit_code, 0);
  ExpectIdle(decode);
}

TEST_F(PrefillKilled, WhileItComputesTheRequestEndsInAClearError) {
  Daemon& prefill = StartPrefill({kSlowPrefill});
  Daemon& decode = StartDecode({&prefill}, {"--tp=2"});
  RunningCli asking = StartGenerate(decode, Ask(1200, 8));
  ASSERT_TRUE(Eventually("claimed", [&] { return HasLease(prefill, "claimed"); }));
  prefill.Kill();
  const CliResult result = asking.Wait();
  ExpectFailure(result, 3, "kPeerUnreachable");
  EXPECT_THAT(Message(result), HasSubstr(prefill.endpoint()));
  ExpectIdle(decode);
}

TEST_F(PrefillKilled, InTheMiddleOfAPullTheRequestEndsInAClearError) {
  Daemon& prefill = StartPrefill({kPacked});
  Daemon& decode = StartDecode({&prefill}, {kPacked, kNoPrefixes});
  std::optional<RunningCli> asking;
  ASSERT_NE(FreezeInTheMiddleOfAPull(decode, {&prefill}, asking), nullptr);
  prefill.Kill();
  const CliResult result = asking->Wait();
  EXPECT_EQ(result.exit_code, 3) << result.out;
  EXPECT_THAT(Message(result), HasSubstr(prefill.endpoint()));
  ExpectIdle(decode);
}

TEST_F(PrefillKilled, InTheMiddleOfAPullTheOtherOneAnswers) {
  Daemon& first = StartPrefill({kPacked});
  Daemon& second = StartPrefill({kPacked, "--tp=2"});
  Daemon& decode = StartDecode({&first, &second}, {kPacked, kNoPrefixes});
  std::optional<RunningCli> asking;
  Daemon* victim = FreezeInTheMiddleOfAPull(decode, {&first, &second}, asking);
  ASSERT_NE(victim, nullptr);
  Daemon& survivor = victim == &first ? second : first;
  victim->Kill();
  const CliResult result = asking->Wait();
  ExpectRightAnswer(result, AskForALargePull());
  EXPECT_EQ(result.json()["prefill"], survivor.endpoint());
  EXPECT_EQ(result.json()["retries"], 1);
  ExpectIdle(decode);
  ExpectIdle(survivor);
}

TEST_F(PrefillKilled, AfterThePullTheRequestGoesOnToItsRightAnswer) {
  Daemon& prefill = StartPrefill();
  Daemon& decode = StartDecode({&prefill});
  const Args ask = Ask(200, 600);
  RunningCli asking = StartGenerate(decode, ask);
  ASSERT_TRUE(Eventually("the KV is here", [&] {
    return Count(decode, "kvrelay_pulls_total{path=\"mapped\",outcome=\"ok\"}") == 1;
  }));
  prefill.Kill();
  ExpectRightAnswer(asking.Wait(), ask);
  ExpectIdle(decode);
}

TEST_F(PrefillKilled, OneOfTwoWhileItComputesTheOtherAnswers) {
  Daemon& first = StartPrefill({kSlowPrefill});
  Daemon& second = StartPrefill({kSlowPrefill});
  Daemon& decode = StartDecode({&first, &second});
  const Args ask = Ask(600, 8);
  RunningCli asking = StartGenerate(decode, ask);
  Daemon* victim = nullptr;
  ASSERT_TRUE(Eventually("one of them computes", [&] {
    if (HasLease(first, "claimed")) victim = &first;
    if (HasLease(second, "claimed")) victim = &second;
    return victim != nullptr;
  }));
  Daemon& survivor = victim == &first ? second : first;
  victim->Kill();
  const CliResult result = asking.Wait();
  ExpectRightAnswer(result, ask);
  EXPECT_EQ(result.json()["prefill"], survivor.endpoint());
  EXPECT_EQ(result.json()["retries"], 1);
  EXPECT_EQ(Count(decode, "kvrelay_retries_total{reason=\"kPeerUnreachable\"}"), 1);
  ExpectServes(decode);
  ExpectIdle(decode);
  ExpectIdle(survivor);
}

struct Restart {
  std::string transport;
  bool same_pid = false;
};

class PrefillRestarted : public FailureStory, public ::testing::WithParamInterface<Restart> {};

TEST_P(PrefillRestarted, AtTheSameAddressIsFoundWithoutARestartOfDecode) {
  const std::string transport = "--transport=" + GetParam().transport;
  const Args flags = {transport, "--engine_id=00112233445566778899aabbccddeeff", "--tp=2"};
  // In a process namespace of its own each daemon is number 1.
  const Args launcher = {"/usr/bin/unshare", "--pid", "--fork", "--kill-child", "--mount-proc"};
  const std::string all = launcher[0] + " --pid --fork --mount-proc true 2>/dev/null";
  if (GetParam().same_pid && std::system(all.c_str()) != 0) {
    GTEST_SKIP() << "no right to make namespaces here";
  }
  if (GetParam().same_pid) LaunchBy(launcher);
  Daemon& before = StartPrefill(flags);
  LaunchBy({});
  Daemon& decode = StartDecode({&before}, {transport});
  ExpectServes(decode, 1);
  const std::string old_incarnation = Look(before)["engine"]["incarnation"];
  const Args under_way = Ask(1500, 8, 2);
  RunningCli asking = StartGenerate(decode, under_way);
  ASSERT_TRUE(Eventually("a lease lives", [&] { return !Look(before)["leases"].empty(); }));
  before.Kill();
  ASSERT_TRUE(Eventually("its port is free", [&] { return Look(before).is_null(); }));

  // The same engine at the same address: only its incarnation tells it from the one before.
  if (GetParam().same_pid) LaunchBy(launcher);
  Daemon& after = StartPrefill({flags[0], flags[1], flags[2], "--listen=" + before.endpoint()});
  LaunchBy({});
  ASSERT_EQ(after.endpoint(), before.endpoint());
  EXPECT_EQ(after.ready()["pid"] == before.ready()["pid"], GetParam().same_pid);
  const CliResult answer = asking.Wait();
  if (answer.exit_code == 0) {
    ExpectRightAnswer(answer, under_way);
  } else {
    ExpectFailure(answer, 3, "kPeerUnreachable");
  }
  Eventually("decode finds it", [&] { return Cli({"health", decode.endpoint()}).exit_code == 0; });
  const Args ask = Ask(300, 16);
  const CliResult result = RunGenerate(decode, ask);
  ExpectRightAnswer(result, ask);
  EXPECT_EQ(result.json()["kv"]["path"], GetParam().transport);

  const std::string new_incarnation = Look(after)["engine"]["incarnation"];
  EXPECT_NE(new_incarnation, old_incarnation);
  const Json decode_now = Look(decode);
  for (const Json& peer : decode_now["peers"]) {
    EXPECT_EQ(peer["incarnation"], new_incarnation) << peer.dump(2);
  }
  ExpectIdle(decode);
  ExpectIdle(after);
}

INSTANTIATE_TEST_SUITE_P(Transports, PrefillRestarted,
                         ::testing::Values(Restart{"mapped"}, Restart{"ucx-packed"},
                                           Restart{"mapped", true}, Restart{"ucx-packed", true}),
                         [](const auto& info) {
                           return std::string(info.param.transport == "mapped" ? "Mapped"
                                                                               : "UcxPacked") +
                                  (info.param.same_pid ? "WithTheSamePid" : "");
                         });

}  // namespace
}  // namespace kvrelay::integration
