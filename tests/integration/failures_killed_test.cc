// kill -9 of a prefill daemon before, during and after a pull; alone and one of two; and a new one
// at the old address.
#include <gmock/gmock.h>

#include <thread>

#include "tests/integration/failure_story.h"

namespace kvrelay::integration {
namespace {

using ::testing::HasSubstr;

class PrefillKilled : public FailureStory {
 protected:
  // Asks until a pull is caught in the middle: the prefill daemon is frozen and the pull does not
  // end by itself. The asking command is left in `asking`.
  bool FreezeInTheMiddleOfAPull(const Daemon& decode, Daemon& prefill, const Args& ask,
                                std::optional<RunningCli>& asking) {
    for (int attempt = 0; attempt < 20; ++attempt) {
      asking.emplace(StartGenerate(decode, ask));
      const bool ended = !Eventually("a pull is under way", [&] { return IsReading(decode); });
      if (ended) return false;
      prefill.Freeze();
      std::this_thread::sleep_for(std::chrono::milliseconds(100));
      if (IsReading(decode)) return true;
      prefill.Thaw();  // all its bytes had left already
      ExpectRightAnswer(asking->Wait(), ask);
    }
    ADD_FAILURE() << "no pull was caught in the middle";
    return false;
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
  Daemon& prefill = StartPrefill({"--transport=ucx-packed"});
  Daemon& decode = StartDecode({&prefill}, {"--transport=ucx-packed"});
  std::optional<RunningCli> asking;
  ASSERT_TRUE(FreezeInTheMiddleOfAPull(decode, prefill, Ask(1900, 8), asking));
  prefill.Kill();
  const CliResult result = asking->Wait();
  EXPECT_EQ(result.exit_code, 3) << result.out;
  EXPECT_THAT(Message(result), HasSubstr(prefill.endpoint()));
  ExpectIdle(decode);
}

TEST_F(PrefillKilled, InTheMiddleOfAPullTheOtherOneAnswers) {
  Daemon& first = StartPrefill({"--transport=ucx-packed"});
  Daemon& other = StartPrefill({"--transport=ucx-packed", "--tp=2"});
  // The first is asked first; the other is asked only when something goes wrong.
  Daemon& decode = StartDecode({&first, &other}, {"--transport=ucx-packed"});
  const Args ask = Ask(1900, 8);
  std::optional<RunningCli> asking;
  for (int attempt = 0; attempt < 20; ++attempt) {
    asking.emplace(StartGenerate(decode, ask));
    ASSERT_TRUE(Eventually("a pull is under way", [&] { return IsReading(decode); }));
    if (HasLease(first, "claimed")) {
      first.Freeze();
      std::this_thread::sleep_for(std::chrono::milliseconds(100));
      if (IsReading(decode)) break;
      first.Thaw();
    }
    ExpectRightAnswer(asking->Wait(), ask);
    asking.reset();
  }
  ASSERT_TRUE(asking) << "no pull was caught in the middle";
  first.Kill();
  const CliResult result = asking->Wait();
  ExpectRightAnswer(result, ask);
  EXPECT_EQ(result.json()["prefill"], other.endpoint());
  EXPECT_EQ(result.json()["retries"], 1);
  ExpectIdle(decode);
  ExpectIdle(other);
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

class PrefillRestarted : public FailureStory, public ::testing::WithParamInterface<std::string> {};

TEST_P(PrefillRestarted, AtTheSameAddressIsFoundWithoutARestartOfDecode) {
  const std::string transport = "--transport=" + GetParam();
  const std::string engine_id = "--engine_id=00112233445566778899aabbccddeeff";
  Daemon& before = StartPrefill({transport, engine_id, "--tp=2"});
  Daemon& decode = StartDecode({&before}, {transport});
  ExpectServes(decode, 1);
  const std::string old_incarnation = Look(before)["engine"]["incarnation"];
  before.Kill();
  // The same engine at the same address: only its incarnation tells it from the one before.
  Daemon& after = StartPrefill({transport, engine_id, "--tp=2", "--listen=" + before.endpoint()});
  ASSERT_EQ(after.endpoint(), before.endpoint());
  Eventually("decode finds it", [&] { return Cli({"health", decode.endpoint()}).exit_code == 0; });
  const Args ask = Ask(300, 16);
  const CliResult result = RunGenerate(decode, ask);
  ExpectRightAnswer(result, ask);
  EXPECT_EQ(result.json()["kv"]["path"], GetParam());

  const std::string new_incarnation = Look(after)["engine"]["incarnation"];
  EXPECT_NE(new_incarnation, old_incarnation);
  for (const Json& peer : Look(decode)["peers"]) {
    EXPECT_EQ(peer["incarnation"], new_incarnation) << peer.dump(2);
  }
  ExpectIdle(decode);
  ExpectIdle(after);
}

INSTANTIATE_TEST_SUITE_P(Transports, PrefillRestarted, ::testing::Values("mapped", "ucx-packed"),
                         [](const auto& info) {
                           return info.param == "mapped" ? "Mapped" : "UcxPacked";
                         });

}  // namespace
}  // namespace kvrelay::integration
