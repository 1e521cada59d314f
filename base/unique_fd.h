// A file descriptor that closes itself.
#pragma once

#include <unistd.h>

#include <utility>

namespace kvrelay {

// Move-only. Holds one descriptor, or none (-1).
class UniqueFd {
 public:
  UniqueFd() = default;
  // Takes over `fd`.
  explicit UniqueFd(int fd) : fd_(fd) {}
  UniqueFd(UniqueFd&& other) noexcept : fd_(other.Release()) {}
  UniqueFd& operator=(UniqueFd&& other) noexcept {
    if (this != &other) Reset(other.Release());
    return *this;
  }
  UniqueFd(const UniqueFd&) = delete;
  UniqueFd& operator=(const UniqueFd&) = delete;
  ~UniqueFd() { Reset(); }

  int get() const { return fd_; }
  bool valid() const { return fd_ >= 0; }
  explicit operator bool() const { return valid(); }

  // Gives the descriptor to the caller, who closes it.
  [[nodiscard]] int Release() { return std::exchange(fd_, -1); }
  // Closes the descriptor, if any, and takes over `fd`. errno stays as it was, so that an error
  // path can close first and report afterwards.
  void Reset(int fd = -1);

 private:
  int fd_ = -1;
};

}  // namespace kvrelay
