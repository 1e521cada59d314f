// Registered memory of a process's own, in pieces of 64 bytes: where one-sided reads put guard
// words, and the beacon that others read.
#pragma once

#include <cstddef>
#include <memory>
#include <string>
#include <vector>

#include "base/mapping.h"
#include "base/status.h"
#include "transport/ucx_memory.h"

namespace kvrelay::transport {

// One thread.
class GuardPads {
 public:
  static constexpr size_t kPadBytes = 64;

  static Result<std::unique_ptr<GuardPads>> Create(std::shared_ptr<UcxContext> context,
                                                   size_t pads);

  // Null when all are in use. Given back when nothing in flight writes it any more.
  std::byte* Take();
  void Give(std::byte* pad) { free_.push_back(pad); }
  const UcxMemory& memory() const { return *memory_; }

 private:
  explicit GuardPads(Mapping mapping) : mapping_(std::move(mapping)) {}

  const Mapping mapping_;
  std::unique_ptr<UcxMemory> memory_;
  std::vector<std::byte*> free_;
};

}  // namespace kvrelay::transport
