#include "tests/transport/child.h"

#include <fcntl.h>
#include <poll.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <unistd.h>

#include <csignal>
#include <cstdlib>
#include <map>

namespace kvrelay::transport {
namespace {

constexpr char kFlag[] = "--child=";

std::map<std::string, ChildMain>& Mains() {
  static std::map<std::string, ChildMain> mains;
  return mains;
}

}  // namespace

Child::Child(const std::string& name, const std::vector<std::string>& arguments) {
  int in[2];
  int out[2];
  if (pipe2(in, O_CLOEXEC) != 0 || pipe2(out, O_CLOEXEC) != 0) std::abort();
  const std::string flag = kFlag + name;
  std::vector<char*> argv = {const_cast<char*>("test"), const_cast<char*>(flag.c_str())};
  for (const std::string& argument : arguments) argv.push_back(const_cast<char*>(argument.c_str()));
  argv.push_back(nullptr);
  pid_ = fork();
  if (pid_ == 0) {
    dup2(in[0], STDIN_FILENO);
    dup2(out[1], STDOUT_FILENO);
    prctl(PR_SET_PDEATHSIG, SIGKILL);
    execv("/proc/self/exe", argv.data());
    _exit(127);
  }
  close(in[0]);
  close(out[1]);
  to_child_.Reset(in[1]);
  from_child_.Reset(out[0]);
}

Child::~Child() { KillAndWait(); }

void Child::Send(const std::string& line) {
  const std::string text = line + '\n';
  if (write(to_child_.get(), text.data(), text.size()) < 0) return;  // it is dead; Receive says so
}

std::string Child::Receive(std::chrono::milliseconds timeout) {
  const auto limit = std::chrono::steady_clock::now() + timeout;
  while (true) {
    if (const size_t end = buffer_.find('\n'); end != std::string::npos) {
      std::string line = buffer_.substr(0, end);
      buffer_.erase(0, end + 1);
      return line;
    }
    const auto left = std::chrono::duration_cast<std::chrono::milliseconds>(
        limit - std::chrono::steady_clock::now());
    pollfd ready{from_child_.get(), POLLIN, 0};
    if (left.count() <= 0 || poll(&ready, 1, static_cast<int>(left.count())) <= 0) return "";
    char bytes[4096];
    const ssize_t count = read(from_child_.get(), bytes, sizeof(bytes));
    if (count <= 0) return "";
    buffer_.append(bytes, static_cast<size_t>(count));
  }
}

void Child::Signal(int signal) const { kill(pid_, signal); }

void Child::KillAndWait() {
  if (pid_ <= 0) return;
  kill(pid_, SIGKILL);
  waitpid(pid_, nullptr, 0);
  pid_ = -1;
}

RegisterChild::RegisterChild(const std::string& name, ChildMain main) {
  Mains()[name] = std::move(main);
}

int RunChild(int argc, char** argv) {
  if (argc < 2 || std::string(argv[1]).rfind(kFlag, 0) != 0) return -1;
  return RunRegisteredChild(std::string(argv[1]).substr(sizeof(kFlag) - 1),
                            std::vector<std::string>(argv + 2, argv + argc));
}

int RunRegisteredChild(const std::string& name, const std::vector<std::string>& arguments) {
  const auto it = Mains().find(name);
  return it == Mains().end() ? 127 : it->second(arguments);
}

}  // namespace kvrelay::transport
