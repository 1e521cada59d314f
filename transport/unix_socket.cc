#include "transport/unix_socket.h"

#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>

#include <cerrno>
#include <cstring>
#include <filesystem>

namespace kvrelay::transport {
namespace {

constexpr int kType = SOCK_SEQPACKET | SOCK_NONBLOCK | SOCK_CLOEXEC;
constexpr int kBacklog = 64;

std::string ErrnoText(const std::string& what) { return what + ": " + std::strerror(errno); }

Status MakeAddress(const std::string& path, sockaddr_un& address) {
  address = {};
  address.sun_family = AF_UNIX;
  if (path.empty() || path.size() >= sizeof(address.sun_path)) {
    return Error(Code::kInvalidArgument, "socket path " + path + " has " +
                                             std::to_string(path.size()) +
                                             " characters; the system allows 1 to " +
                                             std::to_string(sizeof(address.sun_path) - 1));
  }
  std::memcpy(address.sun_path, path.data(), path.size());
  return {};
}

bool WouldBlock() { return errno == EAGAIN || errno == EWOULDBLOCK || errno == EINTR; }

// Room for the largest set of descriptors, aligned as the macros want it.
union ControlBuffer {
  cmsghdr align;
  char bytes[CMSG_SPACE(sizeof(int) * kMaxFdsPerMessage)];
};

std::string WhyNoConnect(const std::string& path, int error) {
  std::error_code ignored;
  const std::filesystem::path folder = std::filesystem::path(path).parent_path();
  switch (error) {
    case ENOENT:
      if (!std::filesystem::exists(folder, ignored)) {
        return "no shared socket folder: " + folder.string() + " does not exist here";
      }
      return "no shared socket: " + path +
             " does not exist here (the owner has ended, or sees another folder of that name)";
    case EACCES:
    case EPERM:
      return "no permission to open the socket " + path;
    case ECONNREFUSED:
      return "nobody listens on the socket " + path + ": the owner has ended";
    default:
      return "cannot connect to the socket " + path + ": " + std::strerror(error);
  }
}

}  // namespace

Result<UniqueFd> ListenUnix(const std::string& path) {
  sockaddr_un address;
  KVRELAY_RETURN_IF_ERROR(MakeAddress(path + '~', address));
  UniqueFd fd(socket(AF_UNIX, kType, 0));
  if (!fd) return Error(Code::kResourceExhausted, ErrnoText("socket"));
  // The mode of the socket file comes from the descriptor's: no moment in which others may connect.
  if (fchmod(fd.get(), 0600) != 0 ||
      bind(fd.get(), reinterpret_cast<const sockaddr*>(&address), sizeof(address)) != 0 ||
      listen(fd.get(), kBacklog) != 0 || rename(address.sun_path, path.c_str()) != 0) {
    return Error(Code::kInvalidArgument, ErrnoText("cannot create the socket " + path));
  }
  return fd;
}

Result<UniqueFd> ConnectUnix(const std::string& path) {
  sockaddr_un address;
  KVRELAY_RETURN_IF_ERROR(MakeAddress(path, address));
  UniqueFd fd(socket(AF_UNIX, kType, 0));
  if (!fd) return Error(Code::kResourceExhausted, ErrnoText("socket"));
  if (connect(fd.get(), reinterpret_cast<const sockaddr*>(&address), sizeof(address)) != 0) {
    const int error = errno;
    if (error == EAGAIN) {
      return Error(Code::kOverloaded, "the backlog of " + path + " is full");
    }
    return Error(Code::kPeerUnreachable, WhyNoConnect(path, error));
  }
  return fd;
}

Result<UniqueFd> AcceptUnix(int listen_fd) {
  UniqueFd fd(accept4(listen_fd, nullptr, nullptr, SOCK_NONBLOCK | SOCK_CLOEXEC));
  if (fd) return fd;
  if (errno == EMFILE || errno == ENFILE || errno == ENOMEM || errno == ENOBUFS) {
    return Error(Code::kResourceExhausted, ErrnoText("accept"));
  }
  return UniqueFd();  // nobody there, or gone again
}

Result<uid_t> PeerUid(int fd) {
  ucred credentials{};
  socklen_t length = sizeof(credentials);
  if (getsockopt(fd, SOL_SOCKET, SO_PEERCRED, &credentials, &length) != 0) {
    return Error(Code::kInternal, ErrnoText("SO_PEERCRED"));
  }
  return credentials.uid;
}

SocketState SendMessage(int fd, std::span<const std::byte> bytes, std::span<const int> fds) {
  iovec data{const_cast<std::byte*>(bytes.data()), bytes.size()};
  msghdr message{};
  message.msg_iov = &data;
  message.msg_iovlen = 1;
  ControlBuffer control{};
  if (!fds.empty()) {
    message.msg_control = control.bytes;
    message.msg_controllen = CMSG_SPACE(fds.size_bytes());
    cmsghdr* header = CMSG_FIRSTHDR(&message);
    header->cmsg_level = SOL_SOCKET;
    header->cmsg_type = SCM_RIGHTS;
    header->cmsg_len = CMSG_LEN(fds.size_bytes());
    std::memcpy(CMSG_DATA(header), fds.data(), fds.size_bytes());
  }
  if (sendmsg(fd, &message, MSG_NOSIGNAL) >= 0) return SocketState::kDone;
  return WouldBlock() ? SocketState::kWouldBlock : SocketState::kClosed;
}

SocketState ReceiveMessage(int fd, std::span<std::byte> buffer, size_t& size,
                           std::vector<UniqueFd>& fds) {
  iovec data{buffer.data(), buffer.size()};
  msghdr message{};
  message.msg_iov = &data;
  message.msg_iovlen = 1;
  ControlBuffer control{};
  message.msg_control = control.bytes;
  message.msg_controllen = sizeof(control.bytes);
  const ssize_t received = recvmsg(fd, &message, MSG_CMSG_CLOEXEC);
  if (received < 0) return WouldBlock() ? SocketState::kWouldBlock : SocketState::kClosed;

  // Owned before anything is judged: descriptors of a bad message must not leak.
  for (cmsghdr* header = CMSG_FIRSTHDR(&message); header != nullptr;
       header = CMSG_NXTHDR(&message, header)) {
    if (header->cmsg_level != SOL_SOCKET || header->cmsg_type != SCM_RIGHTS) continue;
    const size_t count = (header->cmsg_len - CMSG_LEN(0)) / sizeof(int);
    for (size_t i = 0; i < count; ++i) {
      int received_fd = -1;
      std::memcpy(&received_fd, CMSG_DATA(header) + i * sizeof(int), sizeof(int));
      fds.emplace_back(received_fd);
    }
  }
  if (received == 0 || (message.msg_flags & (MSG_TRUNC | MSG_CTRUNC)) != 0) {
    return SocketState::kClosed;
  }
  size = static_cast<size_t>(received);
  return SocketState::kDone;
}

}  // namespace kvrelay::transport
