// Prefill and decode daemons on two hosts with a long, slow or bad cable between them, and one that
// is cut. Skipped where the system does not allow namespaces.
#include "tests/integration/two_hosts.h"

#include <gmock/gmock.h>

#include <iostream>

namespace kvrelay::integration {
namespace {

using ::testing::HasSubstr;

class FarApart : public TwoHosts {
 protected:
  std::optional<CableShape> Shape() const override {
    return CableShape{.delay = Millis(1), .mbit_per_second = 1000};
  }
  // TCP, and nothing that two daemons on one kernel could share besides.
  void Launch(Args prefill_flags = {}, Args decode_flags = {}) {
    std::cout << "the cable: " << cable().kind() << "\n";
    for (Args* flags : {&prefill_flags, &decode_flags}) {
      flags->push_back("--transport=ucx-packed");
      flags->push_back(flags == &prefill_flags ? "--host_id=left" : "--host_id=right");
    }
    LaunchBy(there().Launcher());
    prefill_ = &StartPrefill(There(std::move(prefill_flags)));
    LaunchBy(here().Launcher());  // the client, too: it reaches both from here
    decode_ = &StartDecode({prefill_}, Here(std::move(decode_flags)));
  }
  // Right answers, all of their KV over the cable.
  void ExpectPullsOverTheCable(const std::vector<int>& prompts) {
    for (const int tokens : prompts) {
      const uint64_t before = Arrived();
      const Args ask = Ask(tokens, 16);
      const CliResult result = RunGenerate(*decode_, ask);
      ExpectRightAnswer(result, ask);
      if (result.exit_code != 0) return;
      const Json kv = result.json()["kv"];
      const auto pulled = kv["bytes_pulled"].get<uint64_t>();
      EXPECT_EQ(kv["path"], "ucx-packed");
      EXPECT_GE(Arrived() - before, pulled);
      std::cout << tokens << " tokens, " << pulled << " bytes: " << kv.dump() << "\n";
    }
    ExpectIdle(*decode_);
    ExpectIdle(*prefill_);
  }

  Daemon* prefill_ = nullptr;
  Daemon* decode_ = nullptr;
};

TEST_F(FarApart, TokensAreRight) {
  Launch({"--tp=2"});
  ExpectPullsOverTheCable({1, 17, 1900});
}

class BadCable : public FarApart {
  std::optional<CableShape> Shape() const override {
    return CableShape{.delay = Millis(10), .mbit_per_second = 100, .loss = 0.01};
  }
};

TEST_F(BadCable, TokensAreRightThoughOneFrameInAHundredIsLost) {
  Launch();
  ExpectPullsOverTheCable({17, 900});
}

TEST_F(FarApart, ACutCableMakesAClearErrorInTimeAndAMendedOneServesAgain) {
  Launch({kSlowPrefill, "--lease_ttl_ms=2000"}, {"--pull_timeout_ms=3000"});
  const uint64_t before = Arrived();
  RunningCli asking = StartGenerate(*decode_, Ask(1500, 8));
  // In the middle of the pull: what is computed streams.
  ASSERT_TRUE(Eventually("half a megabyte has come",
                         [&] { return Arrived() - before > (512 << 10) || !asking.running(); }));
  ASSERT_TRUE(asking.running());
  ASSERT_TRUE(cable().Cut());
  const CliResult result = asking.Wait();
  EXPECT_EQ(result.exit_code, 3) << result.out;
  EXPECT_THAT(Message(result), HasSubstr(prefill_->endpoint()));
  EXPECT_LT(result.ms, 30'000 * Slowness());
  std::cout << "after " << result.ms << " ms: " << Message(result) << "\n";
  ExpectIdle(*decode_);
  EXPECT_NE(RunGenerate(*decode_, Ask(50, 8, 900), {"--timeout_ms=2000"}).exit_code, 0);

  ASSERT_TRUE(cable().Mend());
  Eventually(
      "decode reaches it again",
      [&] { return RunGenerate(*decode_, Ask(50, 8, 901)).exit_code == 0; },
      std::chrono::seconds(30));
  ExpectServes(*decode_, 902);
  ExpectIdle(*decode_);
  ExpectIdle(*prefill_);
}

}  // namespace
}  // namespace kvrelay::integration
