// A program that runs beside us and never outlives us.
#pragma once

#include <sys/types.h>

#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "base/clock.h"
#include "base/status.h"
#include "base/unique_fd.h"

namespace kvrelay::tools {

struct ChildOptions {
  std::vector<std::string> argv = {};                                 // argv[0] is the file to run
  std::vector<std::pair<std::string, std::string>> environment = {};  // on top of ours
  bool without_kvrelay_environment = true;  // KVRELAY_* of ours are not handed down
  std::string stdin_path = "/dev/null";
  bool stdin_pipe = false;          // instead: see Write
  std::string stdout_path = {};     // a file to append to; empty: a pipe, see ReadLine
  std::string stderr_path = {};     // a file to append to; empty: ours
  std::string working_folder = {};  // empty: ours
};

// How a process ended.
struct ExitStatus {
  int code = 0;    // when it exited by itself
  int signal = 0;  // when a signal ended it

  bool operator==(const ExitStatus&) const = default;
  std::string ToString() const;  // "exit code 2", "killed by signal 9"
};

// Move-only. Owned by one thread at a time. The child leads its own process group, which is killed
// and reaped by the destructor, and dies with the *thread* that started it (PR_SET_PDEATHSIG):
// start children on a thread that stays.
class ChildProcess {
 public:
  // kNotFound when the file cannot be run.
  static Result<ChildProcess> Start(const ChildOptions& options);

  ChildProcess(ChildProcess&& other) noexcept;
  ChildProcess& operator=(ChildProcess&& other) noexcept;
  ~ChildProcess();

  pid_t pid() const { return pid_; }

  // To its stdin; returns when the child has taken all but what a pipe holds. kPeerUnreachable when
  // it has closed it, kInvalidArgument without stdin_pipe.
  Status Write(std::string_view text);
  // The next line of its stdout without the newline. kDeadlineExceeded; kPeerUnreachable when
  // stdout ended first, after a last line without a newline has been returned.
  Result<std::string> ReadLine(Duration at_most);
  // All further stdout until the child closes it. kDeadlineExceeded, which keeps what came.
  Result<std::string> ReadRest(Duration at_most);

  // To the whole process group. Nothing when it ended already.
  void Signal(int signal) const;
  // kDeadlineExceeded when it still runs.
  Result<ExitStatus> Wait(Duration at_most);
  bool running() { return !Wait(Duration::zero()).has_value(); }
  // SIGKILL and Wait.
  void Kill();

 private:
  ChildProcess() = default;
  // False at the end of stdout.
  Result<bool> ReadMore(TimePoint until);

  pid_t pid_ = -1;
  UniqueFd stdin_;
  UniqueFd stdout_;
  std::string unread_;
  std::optional<ExitStatus> exit_;
};

// The folder that this program's file is in, where its siblings are.
Result<std::string> OwnFolder();

}  // namespace kvrelay::tools
