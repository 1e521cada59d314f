// SIGTERM: daemons finish what they began, within a bound, and refuse what is new.
#include <gmock/gmock.h>

#include "tests/integration/direct.h"
#include "tests/integration/failure_story.h"

namespace kvrelay::integration {
namespace {

using ::testing::HasSubstr;

class Drained : public FailureStory {
 protected:
  static std::string LastLine(const Daemon& daemon) {
    std::string log = daemon.log();
    while (!log.empty() && log.back() == '\n') log.pop_back();
    return log.substr(log.rfind('\n') + 1);
  }
  // Exit code 0 by itself, and that many requests and leases in its last line.
  static void ExpectOrderlyEnd(Daemon& daemon, int cut) {
    const tools::ExitStatus status = daemon.WaitForExit();
    EXPECT_EQ(status, (tools::ExitStatus{.code = 0, .signal = 0})) << status.ToString();
    EXPECT_THAT(LastLine(daemon), HasSubstr("stopped; " + std::to_string(cut) + " requests"));
  }
};

TEST_F(Drained, APrefillWithALiveLeaseServesItUpToItsBoundAndCountsIt) {
  Daemon& prefill = StartPrefill({"--tp=2", "--drain_timeout_ms=1500"});
  DirectReader reader(prefill.endpoint());
  const auto ticket = reader.Prefill(Tokens(100));
  ASSERT_TRUE(ticket) << ticket.error().ToString();
  prefill.Terminate();
  Eventually("it drains", [&] { return Cli({"health", prefill.endpoint()}).exit_code == 5; });
  EXPECT_EQ(reader.Prefill(Tokens(10)).error().code(), Code::kDraining);
  // The open lease is still good.
  const auto claim = reader.Claim(*ticket);
  EXPECT_TRUE(claim) << claim.error().ToString();
  ExpectOrderlyEnd(prefill, 1);
}

TEST_F(Drained, APrefillEndsAsSoonAsItsLeasesAreGivenBack) {
  Daemon& prefill = StartPrefill({"--drain_timeout_ms=60000"});
  DirectReader reader(prefill.endpoint());
  const auto ticket = reader.Prefill(Tokens(100));
  ASSERT_TRUE(ticket) << ticket.error().ToString();
  ASSERT_TRUE(reader.Claim(*ticket));
  prefill.Terminate();
  Eventually("it drains", [&] { return Cli({"health", prefill.endpoint()}).exit_code == 5; });
  EXPECT_TRUE(prefill.running());
  EXPECT_TRUE(reader.Release(*ticket).ok());
  ExpectOrderlyEnd(prefill, 0);
}

TEST_F(Drained, ASecondSignalEndsItAtOnce) {
  Daemon& prefill = StartPrefill({"--drain_timeout_ms=60000"});
  DirectReader reader(prefill.endpoint());
  ASSERT_TRUE(reader.Prefill(Tokens(100)));
  prefill.Terminate();
  Eventually("it drains", [&] { return Cli({"health", prefill.endpoint()}).exit_code == 5; });
  prefill.Terminate();
  EXPECT_EQ(prefill.WaitForExit(), (tools::ExitStatus{.code = 1, .signal = 0}));
}

TEST_F(Drained, APrefillThatComputesFinishesAndTheNextRequestGoesToTheOther) {
  const Args flags = {kSlowPrefill, "--drain_timeout_ms=60000"};
  Daemon& first = StartPrefill(flags);
  Daemon& second = StartPrefill(flags);
  Daemon& decode = StartDecode({&first, &second});
  const Args ask = Ask(400, 8);
  RunningCli asking = StartGenerate(decode, ask);
  Daemon* leaving = nullptr;
  ASSERT_TRUE(Eventually("one of them computes", [&] {
    if (HasLease(first, "claimed")) leaving = &first;
    if (HasLease(second, "claimed")) leaving = &second;
    return leaving != nullptr;
  }));
  Daemon& staying = leaving == &first ? second : first;
  leaving->Interrupt();
  const CliResult result = asking.Wait();
  ExpectRightAnswer(result, ask);
  EXPECT_EQ(result.json()["prefill"], leaving->endpoint());
  EXPECT_EQ(result.json()["retries"], 0);
  ExpectOrderlyEnd(*leaving, 0);
  ExpectServes(decode);
  ExpectIdle(decode);
  ExpectIdle(staying);
}

TEST_F(Drained, ADecodeDaemonFinishesItsStreamAndRefusesNewRequests) {
  Daemon& prefill = StartPrefill();
  Daemon& decode = StartDecode({&prefill}, {"--drain_timeout_ms=300000", "--threads=1"});
  const Args ask = Ask(100, 600);
  RunningCli asking = StartGenerate(decode, ask, {"--timeout_ms=300000"});
  ASSERT_TRUE(Eventually("it decodes", [&] { return Count(decode, "kvrelay_pulls_total") == 1; }));
  decode.Terminate();
  ASSERT_TRUE(Eventually("it drains", [&] {
    return Cli({"health", decode.endpoint()}).exit_code == 5;
  }));
  const CliResult refused = RunGenerate(decode, Ask(50, 8));
  ExpectFailure(refused, 5, "kDraining");
  EXPECT_EQ(refused.json()["error"]["retryable"], true);
  ExpectRightAnswer(asking.Wait(std::chrono::seconds(300)), ask);
  ExpectOrderlyEnd(decode, 0);
  ExpectIdle(prefill);
}

TEST_F(Drained, AStreamThatIsLongerThanTheBoundEndsInAnError) {
  Daemon& prefill = StartPrefill();
  Daemon& decode = StartDecode({&prefill}, {"--drain_timeout_ms=200", "--threads=1"});
  RunningCli asking = StartGenerate(decode, Ask(100, 1900));
  ASSERT_TRUE(Eventually("it decodes", [&] { return Count(decode, "kvrelay_pulls_total") == 1; }));
  decode.Terminate();
  const CliResult result = asking.Wait();
  ExpectFailure(result, 5, "kDraining");
  ExpectOrderlyEnd(decode, 1);
  ExpectIdle(prefill);
}

}  // namespace
}  // namespace kvrelay::integration
