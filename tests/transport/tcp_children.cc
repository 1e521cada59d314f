// Plain TCP between two processes, as a floor for what crosses a network.
#include <arpa/inet.h>
#include <netinet/in.h>
#include <sys/socket.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <iostream>
#include <string>
#include <vector>

#include "base/clock.h"
#include "base/unique_fd.h"
#include "tests/transport/child.h"

namespace kvrelay::transport {
namespace {

constexpr size_t kPiece = 1 << 20;

sockaddr_in SocketAddress(const std::string& ip, uint16_t port) {
  sockaddr_in address{};
  address.sin_family = AF_INET;
  address.sin_port = htons(port);
  inet_pton(AF_INET, ip.c_str(), &address.sin_addr);
  return address;
}

// tcp-sender IP BYTES: says "ready PORT", sends as many to the first that connects, and waits until
// that hangs up.
int SenderMain(const std::vector<std::string>& arguments) {
  const UniqueFd listener(socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0));
  sockaddr_in address = SocketAddress(arguments.at(0), 0);
  socklen_t length = sizeof(address);
  auto* const generic = reinterpret_cast<sockaddr*>(&address);
  if (bind(listener.get(), generic, length) != 0 || listen(listener.get(), 1) != 0 ||
      getsockname(listener.get(), generic, &length) != 0) {
    return 1;
  }
  std::cout << "ready " << ntohs(address.sin_port) << std::endl;
  const UniqueFd peer(accept(listener.get(), nullptr, nullptr));
  std::vector<char> piece(kPiece, 'k');
  for (uint64_t left = std::stoull(arguments.at(1)); left > 0;) {
    const ssize_t sent = write(peer.get(), piece.data(), std::min<uint64_t>(left, piece.size()));
    if (sent <= 0) return 1;
    left -= static_cast<uint64_t>(sent);
  }
  return read(peer.get(), piece.data(), 1) == 0 ? 0 : 1;
}
const RegisterChild kSender("tcp-sender", SenderMain);

// tcp-receiver IP PORT BYTES: says "received MILLISECONDS", the connection included.
int ReceiverMain(const std::vector<std::string>& arguments) {
  const TimePoint begin = std::chrono::steady_clock::now();
  const UniqueFd peer(socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0));
  const sockaddr_in address =
      SocketAddress(arguments.at(0), static_cast<uint16_t>(std::stoul(arguments.at(1))));
  if (connect(peer.get(), reinterpret_cast<const sockaddr*>(&address), sizeof(address)) != 0) {
    return 1;
  }
  std::vector<char> piece(kPiece);
  for (uint64_t left = std::stoull(arguments.at(2)); left > 0;) {
    const ssize_t got = read(peer.get(), piece.data(), std::min<uint64_t>(left, piece.size()));
    if (got <= 0) return 1;
    left -= static_cast<uint64_t>(got);
  }
  std::cout << "received " << ToMillis(std::chrono::steady_clock::now() - begin) << std::endl;
  return 0;
}
const RegisterChild kReceiver("tcp-receiver", ReceiverMain);

}  // namespace
}  // namespace kvrelay::transport
