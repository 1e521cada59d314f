// What two processes of a benchmark say to each other besides what they measure: fixed structs and
// strings over a socket.
#pragma once

#include <sys/types.h>

#include <cstddef>
#include <functional>
#include <string>
#include <type_traits>
#include <utility>

#include "base/status.h"
#include "base/unique_fd.h"
#include "transport/transport.h"

namespace kvrelay::tools {

// One thread at a time. kPeerUnreachable when the other process has ended; no other bound: either
// side ends when the other does.
class Channel {
 public:
  explicit Channel(UniqueFd fd) : fd_(std::move(fd)) {}
  // The two ends of one.
  static Result<std::pair<Channel, Channel>> Pair();

  template <typename T>
  Status Send(const T& value) {
    static_assert(std::is_trivially_copyable_v<T>);
    return Write(&value, sizeof(value));
  }
  template <typename T>
  Status Receive(T& value) {
    static_assert(std::is_trivially_copyable_v<T>);
    return Read(&value, sizeof(value));
  }
  Status SendText(const std::string& text);
  Status ReceiveText(std::string& text);
  Status SendSpec(const transport::PeerSpec& spec);
  Status ReceiveSpec(transport::PeerSpec& spec);

  Status Write(const void* data, size_t bytes);
  Status Read(void* data, size_t bytes);
  // Whether something came, or the other end is gone.
  bool Readable() const;

 private:
  UniqueFd fd_;
};

// The two ends of a TCP connection over loopback.
Result<std::pair<UniqueFd, UniqueFd>> TcpPair();

// A copy of this process that runs a function of its own beside us, and never outlives us. Made
// before this process has threads: libraries do not survive a fork otherwise.
class Beside {
 public:
  // `main` talks to us by the channel; its failure goes to stderr.
  static Result<Beside> Start(const std::function<Status(Channel& channel)>& main);
  Beside(Beside&& other) noexcept
      : pid_(std::exchange(other.pid_, -1)), channel_(std::move(other.channel_)) {}
  Beside& operator=(Beside&&) = delete;
  ~Beside();  // kills it

  pid_t pid() const { return pid_; }
  Channel& channel() { return channel_; }

 private:
  Beside(pid_t pid, Channel channel) : pid_(pid), channel_(std::move(channel)) {}
  pid_t pid_;
  Channel channel_;
};

}  // namespace kvrelay::tools
