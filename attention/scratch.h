// Memory for floats that one thread works in, call after call.
#pragma once

#include <cstddef>
#include <new>

namespace kvrelay::attention {

// 64-byte aligned; grows, never shrinks, keeps nothing when it grows.
class Scratch {
 public:
  Scratch() = default;
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  ~Scratch() { Free(); }

  float* Reserve(size_t floats) {
    if (floats > capacity_) {
      Free();
      data_ = static_cast<float*>(::operator new(floats * sizeof(float), kAlignment));
      capacity_ = floats;
    }
    return data_;
  }

  // A part of `floats` floats takes this many, so that the next part is aligned too.
  static constexpr size_t Padded(size_t floats) { return (floats + 15) / 16 * 16; }

 private:
  static constexpr std::align_val_t kAlignment{64};
  void Free() {
    ::operator delete(data_, kAlignment);
    data_ = nullptr;
    capacity_ = 0;
  }

  float* data_ = nullptr;
  size_t capacity_ = 0;
};

}  // namespace kvrelay::attention
