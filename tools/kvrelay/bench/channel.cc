#include "tools/kvrelay/bench/channel.h"

#include <netinet/in.h>
#include <poll.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cerrno>
#include <csignal>
#include <cstring>

#include "tools/common/output.h"

namespace kvrelay::tools {
namespace {

constexpr size_t kMaxText = 1 << 20;

Status Gone() { return {Code::kPeerUnreachable, "the other process has ended"}; }

}  // namespace

Result<std::pair<Channel, Channel>> Channel::Pair() {
  int fds[2];
  if (::socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, fds) != 0) {
    return Error(Code::kResourceExhausted, std::string("socketpair: ") + std::strerror(errno));
  }
  return std::pair{Channel(UniqueFd(fds[0])), Channel(UniqueFd(fds[1]))};
}

Status Channel::Write(const void* data, size_t bytes) {
  for (const char* at = static_cast<const char*>(data); bytes > 0;) {
    const ssize_t n = ::send(fd_.get(), at, bytes, MSG_NOSIGNAL);
    if (n < 0 && errno == EINTR) continue;
    if (n <= 0) return Gone();
    at += n;
    bytes -= static_cast<size_t>(n);
  }
  return {};
}

Status Channel::Read(void* data, size_t bytes) {
  for (char* at = static_cast<char*>(data); bytes > 0;) {
    const ssize_t n = ::recv(fd_.get(), at, bytes, 0);
    if (n < 0 && errno == EINTR) continue;
    if (n <= 0) return Gone();
    at += n;
    bytes -= static_cast<size_t>(n);
  }
  return {};
}

bool Channel::Readable() const {
  pollfd waiting{fd_.get(), POLLIN, 0};
  return ::poll(&waiting, 1, 0) > 0;
}

Status Channel::SendText(const std::string& text) {
  KVRELAY_RETURN_IF_ERROR(Send(text.size()));
  return Write(text.data(), text.size());
}

Status Channel::ReceiveText(std::string& text) {
  size_t bytes = 0;
  KVRELAY_RETURN_IF_ERROR(Receive(bytes));
  if (bytes > kMaxText) return {Code::kInternal, "a text of " + std::to_string(bytes) + " bytes"};
  text.resize(bytes);
  return Read(text.data(), bytes);
}

Status Channel::SendSpec(const transport::PeerSpec& spec) {
  KVRELAY_RETURN_IF_ERROR(SendText(spec.name));
  KVRELAY_RETURN_IF_ERROR(SendText(spec.address));
  KVRELAY_RETURN_IF_ERROR(Send(spec.incarnation));
  KVRELAY_RETURN_IF_ERROR(Send(spec.region_bytes.size()));
  return Write(spec.region_bytes.data(), spec.region_bytes.size() * sizeof(uint64_t));
}

Status Channel::ReceiveSpec(transport::PeerSpec& spec) {
  KVRELAY_RETURN_IF_ERROR(ReceiveText(spec.name));
  KVRELAY_RETURN_IF_ERROR(ReceiveText(spec.address));
  KVRELAY_RETURN_IF_ERROR(Receive(spec.incarnation));
  size_t regions = 0;
  KVRELAY_RETURN_IF_ERROR(Receive(regions));
  if (regions > kMaxText) return {Code::kInternal, std::to_string(regions) + " regions"};
  spec.region_bytes.resize(regions);
  return Read(spec.region_bytes.data(), regions * sizeof(uint64_t));
}

Result<std::pair<UniqueFd, UniqueFd>> TcpPair() {
  const Status failed(Code::kResourceExhausted, "no TCP connection over loopback");
  const UniqueFd listener(::socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0));
  sockaddr_in address{};
  address.sin_family = AF_INET;
  address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
  socklen_t length = sizeof(address);
  auto* const at = reinterpret_cast<sockaddr*>(&address);
  if (::bind(listener.get(), at, length) != 0 || ::listen(listener.get(), 1) != 0 ||
      ::getsockname(listener.get(), at, &length) != 0) {
    return Error(failed);
  }
  UniqueFd one(::socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0));
  if (::connect(one.get(), at, length) != 0) return Error(failed);
  UniqueFd other(::accept4(listener.get(), nullptr, nullptr, SOCK_CLOEXEC));
  if (!other.valid()) return Error(failed);
  return std::pair{std::move(one), std::move(other)};
}

Result<Beside> Beside::Start(const std::function<Status(Channel& channel)>& main) {
  KVRELAY_ASSIGN_OR_RETURN(auto ends, Channel::Pair());
  const pid_t pid = ::fork();
  if (pid < 0) return Error(Code::kResourceExhausted, std::string("fork: ") + std::strerror(errno));
  if (pid > 0) return Beside(pid, std::move(ends.first));
  ::prctl(PR_SET_PDEATHSIG, SIGKILL);
  { const Channel not_ours = std::move(ends.first); }
  const Status status = main(ends.second);
  if (!status.ok()) WriteErrorLine("the other process: " + status.ToString());
  ::_exit(status.ok() ? 0 : 1);
}

Beside::~Beside() {
  if (pid_ < 0) return;
  ::kill(pid_, SIGKILL);
  ::waitpid(pid_, nullptr, 0);
}

}  // namespace kvrelay::tools
