// Daemons that are stopped (SIGSTOP) and go on, and decode daemons that die with claims in their
// hands.
#include "tests/integration/failure_story.h"

namespace kvrelay::integration {
namespace {

class Stopped : public FailureStory {};

TEST_F(Stopped, TheOnlyPrefillMakesAClearErrorInTimeAndServesAgainAfterwards) {
  Daemon& prefill = StartPrefill();
  Daemon& decode = StartDecode({&prefill});
  ExpectServes(decode);
  prefill.Freeze();
  const CliResult result = RunGenerate(decode, Ask(100, 8), {"--timeout_ms=3000"});
  EXPECT_EQ(result.exit_code, 3) << result.out;
  EXPECT_LT(result.ms, 8000 * Slowness());
  ExpectIdle(decode);
  prefill.Thaw();
  Eventually("decode sees it again", [&] {
    return Cli({"health", decode.endpoint()}).exit_code == 0;
  });
  ExpectServes(decode, 901);
  ExpectIdle(decode);
  ExpectIdle(prefill);
}

TEST_F(Stopped, OneOfTwoWhileItComputesTheOtherAnswers) {
  Daemon& first = StartPrefill({kSlowPrefill});
  Daemon& second = StartPrefill({kSlowPrefill});
  Daemon& decode = StartDecode({&first, &second});
  const Args ask = Ask(600, 8);
  RunningCli asking = StartGenerate(decode, ask);
  Daemon* stopped = nullptr;
  ASSERT_TRUE(Eventually("one of them computes", [&] {
    if (HasLease(first, "claimed")) stopped = &first;
    if (HasLease(second, "claimed")) stopped = &second;
    return stopped != nullptr;
  }));
  Daemon& other = stopped == &first ? second : first;
  stopped->Freeze();
  const CliResult result = asking.Wait();
  ExpectRightAnswer(result, ask);
  EXPECT_EQ(result.json()["prefill"], other.endpoint());
  stopped->Thaw();
  ExpectIdle(*stopped);
  ExpectIdle(other);
  ExpectIdle(decode);
}

// The daemon that read is gone with its claim: nobody releases it, nobody sends heartbeats.
TEST_F(Stopped, AKilledDecodeDaemonsLeaseEndsByItsTimeToLive) {
  Daemon& prefill = StartPrefill({kSlowPrefill, "--lease_ttl_ms=1500"});
  Daemon& decode = StartDecode({&prefill});
  RunningCli asking = StartGenerate(decode, Ask(300, 8), {"--timeout_ms=20000"});
  ASSERT_TRUE(Eventually("claimed", [&] { return HasLease(prefill, "claimed"); }));
  decode.Freeze();  // the claim is made, and will not be given back
  ASSERT_TRUE(Eventually(
      "prefilled", [&] { return Count(prefill, "kvrelay_requests_total{role=\"prefill\"") >= 1; }));
  decode.Kill();
  const CliResult result = asking.Wait();
  EXPECT_EQ(result.exit_code, 3) << result.out;
  ExpectIdle(prefill);
  EXPECT_EQ(Count(prefill, "kvrelay_leases_ended_total{reason=\"reader_silent\"}") +
                Count(prefill, "kvrelay_leases_ended_total{reason=\"prefill_failed\"}"),
            1);
  // Its successor finds everything in order.
  Daemon& next = StartDecode({&prefill});
  ExpectServes(next);
  ExpectIdle(prefill);
}

TEST_F(Stopped, ADecodeDaemonKilledWhileThePrefillComputesLeavesNothingBehind) {
  Daemon& prefill = StartPrefill({kSlowPrefill, "--tp=2", "--lease_ttl_ms=1500"});
  Daemon& decode = StartDecode({&prefill});
  RunningCli asking = StartGenerate(decode, Ask(1500, 8));
  ASSERT_TRUE(Eventually("claimed", [&] { return HasLease(prefill, "claimed"); }));
  decode.Kill();
  EXPECT_EQ(asking.Wait().exit_code, 3);
  ExpectIdle(prefill);
  EXPECT_EQ(Count(prefill, "kvrelay_requests_total{role=\"prefill\",outcome=\"kCancelled\"}"), 1);
}

// The known failure of others: the lease runs out while its reader is away, its blocks get another
// prompt's KV, and the reader comes back and pulls them.
TEST_F(Stopped, BlocksThatGotAnotherPromptMeanwhileAreNeverServed) {
  for (const std::string transport : {"--transport=mapped", "--transport=ucx-packed"}) {
    // 64 blocks of 16 tokens: of the first prompt's 57 the second one needs some.
    Daemon& prefill =
        StartPrefill({"--prefill_chunk=8", transport, "--lease_ttl_ms=500", "--kv_blocks=64"});
    Daemon& sleeper = StartDecode({&prefill}, {transport});
    Daemon& other = StartDecode({&prefill}, {transport});
    ExpectServes(sleeper);  // it has shaken hands: nothing but the pull itself is between
    const Args ask = Ask(900, 8, 1);
    RunningCli asking = StartGenerate(sleeper, ask);
    ASSERT_TRUE(Eventually("claimed", [&] { return HasLease(prefill, "claimed"); }));
    sleeper.Freeze();
    ASSERT_TRUE(Eventually("its lease is over", [&] {
      const Json look = Look(prefill);
      return look.is_object() && look["leases"].empty();
    }));
    const Args overwrite = Ask(250, 8, 2);
    const CliResult overwritten = RunGenerate(other, overwrite);
    sleeper.Thaw();
    ExpectRightAnswer(overwritten, overwrite);
    const CliResult result = asking.Wait();
    if (result.exit_code == 0) {
      ExpectRightAnswer(result, ask);
      // Chunks packed while the lease lived may have waited for it in the network.
      const bool had_to_come_back = transport == "--transport=mapped";
      EXPECT_GE(result.json()["retries"], had_to_come_back ? 1 : 0) << result.out;
    } else {  // it was away for so long that its peers gave it up
      EXPECT_EQ(result.json()["error"]["retryable"], true) << result.out;
    }
    ExpectIdle(prefill);
    ExpectIdle(sleeper);
    ExpectIdle(other);
  }
}

}  // namespace
}  // namespace kvrelay::integration
