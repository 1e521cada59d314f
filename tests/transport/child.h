// Another process for a test: this test binary again, started with --child=NAME, so that no child
// inherits UCX's threads or open transports by fork. Parent and child talk in lines.
#pragma once

#include <sys/types.h>

#include <chrono>
#include <functional>
#include <string>
#include <vector>

#include "base/unique_fd.h"

namespace kvrelay::transport {

class Child {
 public:
  // Dies with its parent. Stdin and stdout are the lines; stderr is the test's.
  explicit Child(const std::string& name, const std::vector<std::string>& arguments = {});
  ~Child();  // kills and waits
  Child(const Child&) = delete;
  Child& operator=(const Child&) = delete;

  pid_t pid() const { return pid_; }
  void Send(const std::string& line);
  // The next line, or "" when none came in time.
  std::string Receive(std::chrono::milliseconds timeout = std::chrono::seconds(20));
  void Signal(int signal) const;
  void KillAndWait();

 private:
  pid_t pid_ = -1;
  UniqueFd to_child_;
  UniqueFd from_child_;
  std::string buffer_;
};

// What `--child=NAME` runs; its result is the exit code.
using ChildMain = std::function<int(const std::vector<std::string>& arguments)>;
struct RegisterChild {
  RegisterChild(const std::string& name, ChildMain main);
};
// 127 when there is none of that name.
int RunRegisteredChild(const std::string& name, const std::vector<std::string>& arguments);
// Exit code, when the command line asks for a child; -1 otherwise.
int RunChild(int argc, char** argv);

}  // namespace kvrelay::transport
