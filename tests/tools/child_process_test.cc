// Children are read, waited for with a bound, and never survive us; signals and closed pipes are
// events.
#include "tools/common/child_process.h"

#include <fcntl.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <unistd.h>

#include <array>
#include <chrono>
#include <csignal>
#include <fstream>
#include <thread>

#include "tools/common/output.h"
#include "tools/common/stop_signals.h"

namespace kvrelay::tools {
namespace {

using namespace std::chrono_literals;

ChildProcess Shell(const std::string& script, ChildOptions options = {}) {
  options.argv = {"/bin/sh", "-c", script};
  Result<ChildProcess> child = ChildProcess::Start(options);
  EXPECT_TRUE(child) << child.error().ToString();
  return std::move(child).value();
}

TEST(ChildProcessTest, ReadsLinesAndTheRest) {
  ChildProcess child = Shell("echo one; echo two; printf three");
  EXPECT_EQ(child.ReadLine(5s).value(), "one");
  EXPECT_EQ(child.ReadRest(5s).value(), "two\nthree");
  EXPECT_EQ(child.Wait(5s).value().ToString(), "exit code 0");
}

TEST(ChildProcessTest, TakesLinesAndNoticesThatNobodyDoesAnyMore) {
  PrepareStandardStreams();  // a closed pipe is no signal
  ChildProcess child = Shell("read a; read b; echo $b $a", {.stdin_pipe = true});
  EXPECT_TRUE(child.Write("world\nhello\n").ok());
  EXPECT_EQ(child.ReadLine(5s).value(), "hello world");
  EXPECT_TRUE(child.Wait(5s).has_value());
  EXPECT_EQ(child.Write("more\n").code(), Code::kPeerUnreachable);
  EXPECT_EQ(Shell("true").Write("x").code(), Code::kInvalidArgument);
}

TEST(ChildProcessTest, TheLastLineNeedsNoNewline) {
  ChildProcess child = Shell("printf last");
  EXPECT_EQ(child.ReadLine(5s).value(), "last");
  EXPECT_EQ(child.ReadLine(5s).error().code(), Code::kPeerUnreachable);
}

TEST(ChildProcessTest, WaitsAreBounded) {
  ChildProcess child = Shell("exec sleep 60");
  const auto start = std::chrono::steady_clock::now();
  EXPECT_EQ(child.ReadLine(30ms).error().code(), Code::kDeadlineExceeded);
  EXPECT_EQ(child.Wait(30ms).error().code(), Code::kDeadlineExceeded);
  EXPECT_TRUE(child.running());
  EXPECT_LT(std::chrono::steady_clock::now() - start, 5s);
}

TEST(ChildProcessTest, TellsHowItEnded) {
  EXPECT_EQ(Shell("exit 7").Wait(5s).value(), (ExitStatus{.code = 7, .signal = 0}));
  ChildProcess child = Shell("exec sleep 60");
  child.Signal(SIGTERM);
  EXPECT_EQ(child.Wait(5s).value().ToString(), "killed by signal 15");
}

TEST(ChildProcessTest, AFileThatCannotRunIsAnError) {
  const auto child = ChildProcess::Start({.argv = {"/nowhere/kvrelayd"}});
  ASSERT_FALSE(child);
  EXPECT_EQ(child.error().message(), "cannot run /nowhere/kvrelayd: No such file or directory");
}

bool Runs(pid_t pid) {
  std::ifstream stat("/proc/" + std::to_string(pid) + "/stat");
  std::string text;
  return std::getline(stat, text) && text.find(") Z ") == std::string::npos;
}

TEST(ChildProcessTest, TheDestructorKillsTheWholeGroup) {
  pid_t grandchild = 0;
  {
    ChildProcess child = Shell("sleep 60 & echo $!; wait");
    grandchild = static_cast<pid_t>(std::stol(child.ReadLine(5s).value()));
    ASSERT_TRUE(Runs(grandchild));
  }
  // Until init reaps it, it may be a zombie for a while.
  for (int i = 0; i < 500 && Runs(grandchild); ++i) std::this_thread::sleep_for(10ms);
  EXPECT_FALSE(Runs(grandchild));
}

TEST(ChildProcessTest, OurFlagsInTheEnvironmentStayOurs) {
  ::setenv("KVRELAY_TP", "4", 1);
  ChildProcess child =
      Shell("echo \"${KVRELAY_TP-none} ${COLOUR-none}\"", {.environment = {{"COLOUR", "red"}}});
  EXPECT_EQ(child.ReadLine(5s).value(), "none red");
  ::unsetenv("KVRELAY_TP");
}

TEST(StopSignalsTest, TheFirstSignalIsAnEvent) {
  auto signals = StopSignals::Install(1);
  ASSERT_TRUE(signals);
  EXPECT_FALSE(signals->stopped());
  EXPECT_FALSE(signals->Wait(10ms));
  ::raise(SIGTERM);
  EXPECT_TRUE(signals->Wait(5s));
  EXPECT_TRUE(signals->stopped()) << "and stays one";
}

TEST(StopSignalsDeathTest, TheSecondEndsTheProcess) {
  EXPECT_EXIT(
      {
        auto signals = StopSignals::Install(1);
        ::raise(SIGINT);
        ::raise(SIGTERM);
      },
      ::testing::ExitedWithCode(1), "");
}

void CloseReadersOfStdout() {
  std::array<int, 2> ends;
  if (::pipe(ends.data()) != 0) ::_exit(1);
  ::close(ends[0]);
  ::dup2(ends[1], STDOUT_FILENO);
}

TEST(OutputDeathTest, AClosedStdoutKillsNothing) {
  EXPECT_EXIT(
      {
        CloseReadersOfStdout();
        PrepareStandardStreams();
        WriteOut("nobody reads this\n");
        WriteOut("nor this\n");
        ::_exit(0);
      },
      ::testing::ExitedWithCode(0), "");
}

TEST(OutputDeathTest, AStdoutThatIsNotOpenGetsNoFilesNumber) {
  EXPECT_EXIT(
      {
        ::close(STDOUT_FILENO);
        PrepareStandardStreams();
        const int next = ::open("/proc/self/stat", O_RDONLY);
        ::_exit(next > STDERR_FILENO && ::fcntl(STDOUT_FILENO, F_GETFD) >= 0 ? 0 : 1);
      },
      ::testing::ExitedWithCode(0), "");
}

}  // namespace
}  // namespace kvrelay::tools
