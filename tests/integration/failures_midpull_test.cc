// A prefill daemon that dies or stops when a part of a pull's bytes has arrived, and no more comes:
// proven by counting on the cable.
#include <gmock/gmock.h>

#include <optional>
#include <thread>

#include "tests/integration/two_hosts.h"

namespace kvrelay::integration {
namespace {

using ::testing::HasSubstr;

constexpr uint64_t kSome = 1 << 20;
constexpr size_t kTokens = 1900;

class MidPull : public TwoHosts {
 protected:
  // Asks, and freezes the far prefill daemon when some of the pull has arrived. Other traffic does
  // not make a tenth of kSome. The asking command is left in `asking`, its prompt in `ask`.
  bool Catch(const Daemon& decode, Daemon& far) {
    constexpr int kAttempts = 20;
    for (int attempt = 0; attempt < kAttempts; ++attempt) {
      ask_ = Ask(kTokens, 8, attempt);
      const uint64_t before = Arrived();
      asking_.emplace(StartGenerate(decode, ask_));
      while (asking_->running()) {
        if (Arrived() - before < kSome) {
          std::this_thread::sleep_for(std::chrono::microseconds(50));
          continue;
        }
        far.Freeze();
        // What the kernel had been given still comes.
        std::this_thread::sleep_for(std::chrono::milliseconds(200));
        const uint64_t arrived = Arrived() - before;
        if (asking_->running() && arrived < pull_bytes_) {
          std::cout << "stopped after " << arrived << " of " << pull_bytes_ << " bytes\n";
          return true;
        }
        far.Thaw();
        break;
      }
      ExpectRightAnswer(asking_->Wait(), ask_);
    }
    ADD_FAILURE() << "no pull was caught in the middle in " << kAttempts << " attempts";
    return false;
  }

  // A whole one, and how large it is.
  void Measure(const Daemon& decode) {
    const CliResult result = RunGenerate(decode, Ask(kTokens, 8, 99));
    ExpectRightAnswer(result, Ask(kTokens, 8, 99));
    pull_bytes_ = result.json()["kv"]["bytes_pulled"].get<uint64_t>();
    ASSERT_GT(pull_bytes_, 4 * kSome);
  }

  uint64_t pull_bytes_ = 0;
  Args ask_;
  std::optional<RunningCli> asking_;
};

TEST_F(MidPull, KilledWhenAPartHasArrivedMakesAClearError) {
  LaunchBy(there().Launcher());
  Daemon& far = StartPrefill(There());
  LaunchBy(here().Launcher());
  Daemon& decode = StartDecode({&far}, Here());
  Measure(decode);
  ASSERT_TRUE(Catch(decode, far));
  far.Kill();
  const CliResult result = asking_->Wait();
  EXPECT_EQ(result.exit_code, 3) << result.out;
  EXPECT_THAT(Message(result), HasSubstr(far.endpoint()));
  ExpectIdle(decode);
}

TEST_F(MidPull, KilledWhenAPartHasArrivedTheOtherOneAnswers) {
  LaunchBy(there().Launcher());
  Daemon& far = StartPrefill(There());
  LaunchBy(here().Launcher());
  Daemon& near = StartPrefill(Here());
  Daemon& decode = StartDecode({&far, &near}, Here());
  pull_bytes_ = uint64_t{8} << 20;  // less than a whole one
  ASSERT_TRUE(Catch(decode, far));
  far.Kill();
  const CliResult result = asking_->Wait();
  ExpectRightAnswer(result, ask_);
  EXPECT_EQ(result.json()["prefill"], near.endpoint());
  EXPECT_EQ(result.json()["retries"], 1);
  ExpectIdle(decode);
  ExpectIdle(near);
}

TEST_F(MidPull, StoppedForAWhileTheRequestGoesOnToItsRightAnswer) {
  LaunchBy(there().Launcher());
  Daemon& far = StartPrefill(There());
  LaunchBy(here().Launcher());
  Daemon& decode = StartDecode({&far}, Here());
  Measure(decode);
  ASSERT_TRUE(Catch(decode, far));
  std::this_thread::sleep_for(std::chrono::seconds(1));
  EXPECT_TRUE(asking_->running());
  far.Thaw();
  ExpectRightAnswer(asking_->Wait(), ask_);
  ExpectIdle(decode);
  ExpectIdle(far);
}

TEST_F(MidPull, StoppedForLongerThanAPullMayTakeTheOtherOneAnswersAndNothingLeaks) {
  LaunchBy(there().Launcher());
  Daemon& far = StartPrefill(There({"--lease_ttl_ms=2000"}));
  LaunchBy(here().Launcher());
  Daemon& near = StartPrefill(Here());
  Daemon& decode = StartDecode({&far, &near}, Here({"--pull_timeout_ms=1500"}));
  pull_bytes_ = uint64_t{8} << 20;
  ASSERT_TRUE(Catch(decode, far));
  // Others go on meanwhile.
  const Args other = Ask(100, 8, 50);
  const CliResult meanwhile = RunGenerate(decode, other);
  ExpectRightAnswer(meanwhile, other);
  const CliResult result = asking_->Wait();
  ExpectRightAnswer(result, ask_);
  EXPECT_EQ(result.json()["prefill"], near.endpoint());
  EXPECT_GE(result.json()["retries"], 1);
  far.Thaw();
  ExpectIdle(far);
  ExpectIdle(near);
  ExpectIdle(decode);
  for (int n = 0; n < 3; ++n) ExpectServes(decode, 60 + n);
}

TEST_F(MidPull, TheOnlyOneStoppedForLongerThanAPullMayTakeMakesAClearErrorInTime) {
  LaunchBy(there().Launcher());
  Daemon& far = StartPrefill(There({"--lease_ttl_ms=2000"}));
  LaunchBy(here().Launcher());
  Daemon& decode = StartDecode({&far}, Here({"--pull_timeout_ms=1000"}));
  Measure(decode);
  ASSERT_TRUE(Catch(decode, far));
  const CliResult result = asking_->Wait();
  EXPECT_EQ(result.exit_code, 3) << result.out;
  EXPECT_THAT(Message(result), HasSubstr(far.endpoint()));
  EXPECT_LT(result.ms, 20'000 * Slowness());
  ExpectIdle(decode);
  far.Thaw();
  ExpectIdle(far);
  // Three failures in a row set it aside for a second.
  Eventually("decode asks it again",
             [&] { return RunGenerate(decode, Ask(50, 8, 901)).exit_code == 0; });
  ExpectServes(decode, 902);
}

}  // namespace
}  // namespace kvrelay::integration
