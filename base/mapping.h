// A range of address space that unmaps itself.
#pragma once

#include <cstddef>
#include <cstdint>
#include <utility>

#include "base/status.h"

namespace kvrelay {

// Move-only. Holds one mmap()ed range, or none. The descriptor that it was made from may be closed
// meanwhile.
class Mapping {
 public:
  Mapping() = default;
  Mapping(Mapping&& other) noexcept
      : data_(std::exchange(other.data_, nullptr)), bytes_(std::exchange(other.bytes_, 0)) {}
  Mapping& operator=(Mapping&& other) noexcept {
    if (this != &other) {
      Reset();
      data_ = std::exchange(other.data_, nullptr);
      bytes_ = std::exchange(other.bytes_, 0);
    }
    return *this;
  }
  Mapping(const Mapping&) = delete;
  Mapping& operator=(const Mapping&) = delete;
  ~Mapping() { Reset(); }

  // mmap(nullptr, bytes, protection, flags, fd, offset). kInvalidArgument for 0 bytes;
  // kResourceExhausted, naming the bytes, when the kernel has no room; kInternal otherwise.
  static Result<Mapping> Map(size_t bytes, int protection, int flags, int fd, int64_t offset = 0);

  std::byte* data() const { return data_; }
  size_t bytes() const { return bytes_; }  // as asked; the kernel rounds up to whole pages
  bool valid() const { return data_ != nullptr; }
  void Reset();

 private:
  Mapping(std::byte* data, size_t bytes) : data_(data), bytes_(bytes) {}

  std::byte* data_ = nullptr;
  size_t bytes_ = 0;
};

}  // namespace kvrelay
