// Real daemons and the real command line over loopback, for tests that read like stories:
//
//   TEST_F(Story, DecodeSurvivesAKilledPrefill) {
//     Daemon& prefill = StartPrefill({"--tp=2"});
//     Daemon& decode = StartDecode({&prefill});
//     prefill.Kill();
//     CliResult result = Cli({"generate", "--decode=" + decode.endpoint(), "--prompt=hello",
//     "--json"}); EXPECT_EQ(result.exit_code, 3);
//   }
//
// Every wait has a bound; whatever a test does, its processes are dead and its folder is gone when
// it ends. Daemons' stderr goes to files, whose ends are printed when the test failed. In sanitizer
// builds daemons that still run are ended by SIGTERM, so that leaks show, and a sanitizer's report
// by any program fails the test.
#pragma once

#include <gtest/gtest.h>

#include <chrono>
#include <functional>
#include <memory>
#include <nlohmann/json.hpp>
#include <optional>
#include <string>
#include <vector>

#include "tests/common/slowness.h"
#include "tools/common/child_process.h"

namespace kvrelay::integration {

using Json = nlohmann::json;
using Args = std::vector<std::string>;

using tests::Slowness;

// One kvrelayd. Lives as long as its Story.
class Daemon {
 public:
  // `launcher`: a command line in front of the daemon's. Bounded by 60 s; a test failure (and a
  // daemon that is not running) when no ready line comes.
  Daemon(std::string name, const Args& args, const std::string& folder, const Args& launcher);

  bool started() const { return !ready_.is_null(); }
  const Json& ready() const { return ready_; }  // its first line
  std::string endpoint() const { return started() ? ready_.value("endpoint", "") : ""; }
  pid_t pid() const { return process_ ? process_->pid() : -1; }
  const std::string& name() const { return name_; }
  std::string log() const;  // its stderr up to now

  void Kill();       // SIGKILL; returns when it is gone
  void Freeze();     // SIGSTOP; returns when no thread of it runs
  void Thaw();       // SIGCONT
  void Terminate();  // SIGTERM; does not wait
  void Interrupt();  // SIGINT; does not wait
  bool running();
  // Its end, by itself, within the bound; a test failure and signal -1 otherwise.
  tools::ExitStatus WaitForExit(Duration at_most = std::chrono::seconds(20));

 private:
  std::string name_;
  std::string log_path_;
  std::optional<tools::ChildProcess> process_;
  Json ready_;
};

struct CliResult {
  int exit_code = -1;  // -1: killed after its time
  std::string out;
  std::string err;
  double ms = 0;

  // `out` as one JSON value; a test failure and null when it is none.
  Json json() const;
};

// A command in work.
class RunningCli {
 public:
  RunningCli(const Args& args, const std::string& folder, const Args& launcher);
  void Signal(int signal) const;
  bool running() { return process_ && process_->running(); }
  std::string out() const;  // up to now
  // Kills it when the time is over; that is a test failure.
  CliResult Wait(Duration at_most = std::chrono::seconds(60));

 private:
  std::string out_path_;
  std::string err_path_;
  std::string command_;
  TimePoint started_;
  std::optional<tools::ChildProcess> process_;
};

class Story : public ::testing::Test {
 protected:
  Story();
  ~Story() override;

  // kvrelayd with the bundled model, port 0, its own name in messages and this story's run folder.
  // Later flags may add to these, not repeat them; `model` and `listen` replace the defaults.
  Daemon& StartPrefill(Args flags = {});
  Daemon& StartDecode(const std::vector<Daemon*>& prefills, Args flags = {});
  // From now on all programs are started by this command line.
  void LaunchBy(Args launcher) { launcher_ = std::move(launcher); }
  // kvrelayd that is expected to end by itself: exit code and output.
  CliResult RunDaemon(const Args& args, Duration at_most = std::chrono::seconds(30));

  // kvrelay with these arguments, to its end.
  CliResult Cli(const Args& args, Duration at_most = std::chrono::seconds(60));
  RunningCli StartCli(Args args);

  // Token ids, greedy, on the decode daemon; a test failure and an empty list when that fails.
  std::vector<uint32_t> Generate(const Daemon& decode, const Args& flags);
  // The same in one process with the bundled model.
  std::vector<uint32_t> GenerateLocal(const Args& flags);
  // `kvrelay inspect --json`; a test failure and null when nobody answers.
  Json Inspect(const Daemon& daemon);

  // Asks every 20 ms until it is so; a test failure that quotes `what` when it is not in time.
  bool Eventually(const std::string& what, const std::function<bool()>& holds,
                  Duration at_most = std::chrono::seconds(10));

  // Nothing left: no lease, no session, no block in use beyond those of cached prefixes and kept
  // conversations, no quarantine.
  void ExpectIdle(const Daemon& daemon);

  const std::string& folder() const { return folder_; }
  std::string run_dir() const { return folder_ + "/run"; }
  static std::string BundledModel();

 private:
  Daemon& Start(const std::string& name, Args args);
  void EndDaemonsGently();
  void ExpectNoSanitizerReports();

  std::string folder_;
  Args launcher_;
  std::vector<std::unique_ptr<Daemon>> daemons_;
};

}  // namespace kvrelay::integration
