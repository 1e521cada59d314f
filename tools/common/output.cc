#include "tools/common/output.h"

#include <fcntl.h>
#include <unistd.h>

#include <cerrno>
#include <csignal>
#include <nlohmann/json.hpp>

namespace kvrelay::tools {
namespace {

void WriteAll(int fd, std::string_view text) {
  while (!text.empty()) {
    const ssize_t written = ::write(fd, text.data(), text.size());
    if (written < 0) {
      if (errno == EINTR) continue;
      return;
    }
    text.remove_prefix(static_cast<size_t>(written));
  }
}

}  // namespace

void PrepareStandardStreams() {
  std::signal(SIGPIPE, SIG_IGN);
  for (const int fd : {STDIN_FILENO, STDOUT_FILENO, STDERR_FILENO}) {
    if (::fcntl(fd, F_GETFD) >= 0 || errno != EBADF) continue;
    // The lowest free number, which is this one. Without /dev/null there is nothing to be done.
    [[maybe_unused]] const int opened = ::open("/dev/null", O_RDWR);
  }
}

void WriteOut(std::string_view text) { WriteAll(STDOUT_FILENO, text); }

void WriteErrorLine(std::string_view text) { WriteAll(STDERR_FILENO, std::string(text) + "\n"); }

bool StdoutIsTerminal() { return ::isatty(STDOUT_FILENO) == 1; }
bool StderrIsTerminal() { return ::isatty(STDERR_FILENO) == 1; }

std::string ErrorJson(const Status& status, std::string_view peer) {
  const nlohmann::ordered_json json = {{"schema", 1},
                                       {"error",
                                        {{"code", CodeName(status.code())},
                                         {"message", status.message()},
                                         {"peer", peer},
                                         {"retryable", IsRetryable(status.code())}}}};
  // Messages may quote bytes from the wire.
  return json.dump(-1, ' ', false, nlohmann::ordered_json::error_handler_t::replace);
}

void ReportFailure(std::string_view program, const Status& status, std::string_view peer,
                   bool json) {
  if (json) {
    WriteOut(ErrorJson(status, peer) + "\n");
    return;
  }
  std::string line(program);
  line += ": " + status.message() + " (" + std::string(CodeName(status.code())) + ")";
  if (IsRetryable(status.code())) line += "; trying again can help";
  WriteErrorLine(line);
}

}  // namespace kvrelay::tools
