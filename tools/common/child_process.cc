#include "tools/common/child_process.h"

#include <fcntl.h>
#include <poll.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <chrono>
#include <csignal>
#include <cstring>
#include <filesystem>
#include <thread>

extern char** environ;  // NOLINT(readability-redundant-declaration)

namespace kvrelay::tools {
namespace {

using std::chrono::steady_clock;

constexpr Duration kPollInterval = std::chrono::milliseconds(2);
constexpr Duration kKillDeadline = std::chrono::seconds(10);

Status SystemError(const std::string& what) {
  return {Code::kResourceExhausted, what + ": " + std::strerror(errno)};
}

std::vector<std::string> ChildEnvironment(const ChildOptions& options) {
  std::vector<std::string> all;
  for (char** entry = environ; *entry != nullptr; ++entry) {
    const std::string_view text = *entry;
    if (options.without_kvrelay_environment && text.starts_with("KVRELAY_")) continue;
    const bool replaced =
        std::any_of(options.environment.begin(), options.environment.end(),
                    [text](const auto& set) { return text.starts_with(set.first + "="); });
    if (!replaced) all.emplace_back(text);
  }
  for (const auto& [name, value] : options.environment) all.push_back(name + "=" + value);
  return all;
}

std::vector<char*> Pointers(std::vector<std::string>& strings) {
  std::vector<char*> pointers;
  pointers.reserve(strings.size() + 1);
  for (std::string& s : strings) pointers.push_back(s.data());
  pointers.push_back(nullptr);
  return pointers;
}

UniqueFd OpenToAppend(const std::string& path) {
  return UniqueFd(::open(path.c_str(), O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0600));
}

// What the child does between fork and exec. Other threads of the parent do not exist here and may
// have held any lock: only async-signal-safe calls.
struct ChildSetup {
  pid_t parent;
  int in;
  int out;
  int err;  // -1: keep
  const char* folder;
  char* const* argv;
  char* const* environment;
  int failure;  // errno goes here when exec fails

  [[noreturn]] void Run() const {
    ::prctl(PR_SET_PDEATHSIG, SIGKILL);
    if (::getppid() != parent) ::_exit(127);
    ::setpgid(0, 0);
    sigset_t none;
    sigemptyset(&none);
    ::sigprocmask(SIG_SETMASK, &none, nullptr);
    ::signal(SIGPIPE, SIG_DFL);
    const bool ready = ::dup2(in, STDIN_FILENO) >= 0 && ::dup2(out, STDOUT_FILENO) >= 0 &&
                       (err < 0 || ::dup2(err, STDERR_FILENO) >= 0) &&
                       (*folder == '\0' || ::chdir(folder) == 0);
    if (ready) ::execve(argv[0], argv, environment);
    const int error = errno;
    [[maybe_unused]] const ssize_t written = ::write(failure, &error, sizeof(error));
    ::_exit(127);
  }
};

}  // namespace

std::string ExitStatus::ToString() const {
  return signal != 0 ? "killed by signal " + std::to_string(signal)
                     : "exit code " + std::to_string(code);
}

Result<ChildProcess> ChildProcess::Start(const ChildOptions& options) {
  std::array<int, 2> out_pipe = {-1, -1};
  std::array<int, 2> failure_pipe = {-1, -1};
  if (::pipe2(out_pipe.data(), O_CLOEXEC) != 0) return Error(SystemError("pipe"));
  UniqueFd out_read(out_pipe[0]);
  UniqueFd out_write(out_pipe[1]);
  if (::pipe2(failure_pipe.data(), O_CLOEXEC) != 0) return Error(SystemError("pipe"));
  UniqueFd failure_read(failure_pipe[0]);
  UniqueFd failure_write(failure_pipe[1]);

  UniqueFd in_write;
  UniqueFd in;
  if (options.stdin_pipe) {
    std::array<int, 2> in_pipe = {-1, -1};
    if (::pipe2(in_pipe.data(), O_CLOEXEC) != 0) return Error(SystemError("pipe"));
    in = UniqueFd(in_pipe[0]);
    in_write = UniqueFd(in_pipe[1]);
  } else {
    in = UniqueFd(::open(options.stdin_path.c_str(), O_RDONLY | O_CLOEXEC));
    if (!in.valid()) return Error(SystemError(options.stdin_path));
  }
  if (!options.stdout_path.empty()) {
    out_read.Reset();
    out_write = OpenToAppend(options.stdout_path);
    if (!out_write.valid()) return Error(SystemError(options.stdout_path));
  }
  UniqueFd err;
  if (!options.stderr_path.empty()) {
    err = OpenToAppend(options.stderr_path);
    if (!err.valid()) return Error(SystemError(options.stderr_path));
  }

  std::vector<std::string> argv = options.argv;
  std::vector<std::string> environment = ChildEnvironment(options);
  const std::vector<char*> argv_pointers = Pointers(argv);
  const std::vector<char*> environment_pointers = Pointers(environment);
  const ChildSetup setup = {.parent = ::getpid(),
                            .in = in.get(),
                            .out = out_write.get(),
                            .err = err.get(),
                            .folder = options.working_folder.c_str(),
                            .argv = argv_pointers.data(),
                            .environment = environment_pointers.data(),
                            .failure = failure_write.get()};
  const pid_t pid = ::fork();
  if (pid < 0) return Error(SystemError("fork"));
  if (pid == 0) setup.Run();

  ChildProcess child;
  child.pid_ = pid;
  child.stdin_ = std::move(in_write);
  child.stdout_ = std::move(out_read);
  // Both sides set it: whoever is first.
  ::setpgid(pid, pid);
  failure_write.Reset();
  int exec_errno = 0;
  ssize_t got = 0;
  do {
    got = ::read(failure_read.get(), &exec_errno, sizeof(exec_errno));
  } while (got < 0 && errno == EINTR);
  if (got == sizeof(exec_errno)) {
    return Error(Code::kNotFound,
                 "cannot run " + options.argv[0] + ": " + std::strerror(exec_errno));
  }
  return child;
}

ChildProcess::ChildProcess(ChildProcess&& other) noexcept
    : pid_(std::exchange(other.pid_, -1)),
      stdin_(std::move(other.stdin_)),
      stdout_(std::move(other.stdout_)),
      unread_(std::move(other.unread_)),
      exit_(other.exit_) {}

ChildProcess& ChildProcess::operator=(ChildProcess&& other) noexcept {
  if (this != &other) {
    Kill();
    pid_ = std::exchange(other.pid_, -1);
    stdin_ = std::move(other.stdin_);
    stdout_ = std::move(other.stdout_);
    unread_ = std::move(other.unread_);
    exit_ = other.exit_;
  }
  return *this;
}

ChildProcess::~ChildProcess() { Kill(); }

Status ChildProcess::Write(std::string_view text) {
  if (!stdin_.valid()) return {Code::kInvalidArgument, "the child's stdin is no pipe of ours"};
  while (!text.empty()) {
    const ssize_t written = ::write(stdin_.get(), text.data(), text.size());
    if (written < 0 && errno == EINTR) continue;
    if (written <= 0) return {Code::kPeerUnreachable, "the child has closed its stdin"};
    text.remove_prefix(static_cast<size_t>(written));
  }
  return {};
}

Result<bool> ChildProcess::ReadMore(TimePoint until) {
  for (;;) {
    pollfd waiting = {.fd = stdout_.get(), .events = POLLIN, .revents = 0};
    const auto left = std::chrono::ceil<std::chrono::milliseconds>(until - steady_clock::now());
    const int ready =
        ::poll(&waiting, 1, static_cast<int>(std::clamp<int64_t>(left.count(), 0, 1 << 30)));
    if (ready == 0) return Error(Code::kDeadlineExceeded, "no output in time");
    if (ready < 0) {
      if (errno == EINTR) continue;
      return Error(SystemError("poll"));
    }
    std::array<char, 4096> buffer;
    const ssize_t got = ::read(stdout_.get(), buffer.data(), buffer.size());
    if (got < 0 && errno == EINTR) continue;
    if (got <= 0) return false;
    unread_.append(buffer.data(), static_cast<size_t>(got));
    return true;
  }
}

Result<std::string> ChildProcess::ReadLine(Duration at_most) {
  const TimePoint until = steady_clock::now() + at_most;
  for (;;) {
    if (const size_t newline = unread_.find('\n'); newline != std::string::npos) {
      std::string line = unread_.substr(0, newline);
      unread_.erase(0, newline + 1);
      return line;
    }
    KVRELAY_ASSIGN_OR_RETURN(const bool more, ReadMore(until));
    if (more) continue;
    if (unread_.empty()) return Error(Code::kPeerUnreachable, "the process closed its stdout");
    return std::exchange(unread_, {});
  }
}

Result<std::string> ChildProcess::ReadRest(Duration at_most) {
  const TimePoint until = steady_clock::now() + at_most;
  for (;;) {
    KVRELAY_ASSIGN_OR_RETURN(const bool more, ReadMore(until));
    if (!more) return std::exchange(unread_, {});
  }
}

void ChildProcess::Signal(int signal) const {
  if (pid_ > 0 && !exit_) ::kill(-pid_, signal);
}

Result<ExitStatus> ChildProcess::Wait(Duration at_most) {
  const TimePoint until = steady_clock::now() + at_most;
  while (!exit_) {
    int status = 0;
    const pid_t ended = ::waitpid(pid_, &status, WNOHANG);
    if (ended == pid_) {
      exit_ = WIFSIGNALED(status) ? ExitStatus{.code = 0, .signal = WTERMSIG(status)}
                                  : ExitStatus{.code = WEXITSTATUS(status), .signal = 0};
      break;
    }
    if (ended < 0 && errno != EINTR) return Error(SystemError("waitpid"));
    if (steady_clock::now() >= until) {
      return Error(Code::kDeadlineExceeded, "process " + std::to_string(pid_) + " still runs");
    }
    std::this_thread::sleep_for(kPollInterval);
  }
  return *exit_;
}

void ChildProcess::Kill() {
  if (pid_ <= 0) return;
  // The group may outlive its leader.
  ::kill(-pid_, SIGKILL);
  [[maybe_unused]] const Result<ExitStatus> ended = Wait(kKillDeadline);
}

Result<std::string> OwnFolder() {
  std::error_code error;
  const std::filesystem::path self = std::filesystem::read_symlink("/proc/self/exe", error);
  if (error) return Error(Code::kInternal, "/proc/self/exe: " + error.message());
  return self.parent_path().string();
}

}  // namespace kvrelay::tools
