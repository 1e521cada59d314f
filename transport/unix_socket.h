// Unix sockets that pass descriptors: SOCK_SEQPACKET (one send is one receive), non-blocking,
// CLOEXEC.
#pragma once

#include <sys/types.h>

#include <cstddef>
#include <span>
#include <string>
#include <vector>

#include "base/status.h"
#include "base/unique_fd.h"

namespace kvrelay::transport {

inline constexpr size_t kMaxFdsPerMessage = 32;

// What a non-blocking call came to.
enum class SocketState : uint8_t { kDone, kWouldBlock, kClosed };

// Binds (mode 0600) and listens; `path` appears only when the socket listens already.
// kInvalidArgument, naming the limit, when it is too long for a socket address.
Result<UniqueFd> ListenUnix(const std::string& path);

// kPeerUnreachable says which of the usual reasons it is: no such folder here, no such socket, no
// permission, nobody listens. kOverloaded when the listener's backlog is full: try again.
Result<UniqueFd> ConnectUnix(const std::string& path);

// One waiting connection, or an invalid descriptor when none waits. kResourceExhausted when this
// process is out of descriptors.
Result<UniqueFd> AcceptUnix(int listen_fd);

// The user whose process is on the other side, as the kernel knows it.
Result<uid_t> PeerUid(int fd);

// All of `bytes` and `fds` (at most kMaxFdsPerMessage), or nothing.
SocketState SendMessage(int fd, std::span<const std::byte> bytes, std::span<const int> fds);

// One message. kDone: `size` of its bytes are in `buffer` (a longer message counts as closed: no
// peer of ours sends one), and `fds` owns the descriptors that came with it. kClosed: end of file
// or a broken connection.
SocketState ReceiveMessage(int fd, std::span<std::byte> buffer, size_t& size,
                           std::vector<UniqueFd>& fds);

}  // namespace kvrelay::transport
