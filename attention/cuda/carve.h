// How a workspace is divided.
#pragma once

#include <cstddef>

namespace kvrelay::attention::cuda {

// Hands out consecutive parts of the workspace, each on 256 bytes. Without a base: only counts.
class Carve {
 public:
  explicit Carve(void* base) : base_(static_cast<std::byte*>(base)) {}
  template <typename T>
  void Take(T*& to, size_t count) {
    to = base_ == nullptr ? nullptr : reinterpret_cast<T*>(base_ + bytes_);
    bytes_ += (count * sizeof(T) + 255) / 256 * 256;
  }
  size_t bytes() const { return bytes_; }

 private:
  std::byte* base_;
  size_t bytes_ = 0;
};

}  // namespace kvrelay::attention::cuda
