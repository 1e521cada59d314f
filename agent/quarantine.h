// How much of a rank's cache may be in the hands of operations that cannot be recalled.
#pragma once

#include <cstdint>

namespace kvrelay::agent {

// A pull that is cancelled keeps its blocks until its transport lets go of them. Where that depends
// on hardware (Transport::lingers), room for all its blocks is reserved before the pull starts, so
// that whatever goes wrong no more than `limit` bytes are ever out of use. Control thread.
class Quarantine {
 public:
  explicit Quarantine(uint64_t limit) : limit_(limit) {}

  uint64_t free() const { return limit_ - reserved_; }
  // At most what is free.
  void Reserve(uint64_t bytes) { reserved_ += bytes; }
  void Return(uint64_t bytes) { reserved_ -= bytes; }

 private:
  const uint64_t limit_;
  uint64_t reserved_ = 0;
};

}  // namespace kvrelay::agent
