// A registered span of memory and the handle by which another process on this host can map it,
// read-only.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <string>

#include "base/mapping.h"
#include "base/status.h"
#include "base/unique_fd.h"

namespace kvrelay {

enum class DeviceKind : uint8_t { kCpu = 0, kCuda = 1 };

// Memory that we allocated. Host memory is a memfd: CLOEXEC, MADV_DONTFORK, size sealed against
// shrink and grow (no SIGBUS by truncation), future writes through other mappings sealed.
// Move-only; unmaps and closes in its destructor.
class Region {
 public:
  // `name` shows in /proc/*/maps. Rounds up to whole pages; zero-filled; asks for huge pages and
  // goes without. All of it is committed before the call returns, so that a shortage is an error
  // here: kResourceExhausted, with the bytes asked and available, and never a SIGBUS later.
  static Result<Region> AllocateHost(uint64_t bytes, const std::string& name);

  std::byte* data() const;
  uint64_t bytes() const;  // as asked
  DeviceKind device() const { return DeviceKind::kCpu; }
  const std::string& name() const { return name_; }
  // A descriptor of the same memory, opened read-only, for SCM_RIGHTS.
  int export_fd() const;

 private:
  Region() = default;
  std::string name_;
  uint64_t bytes_ = 0;
  UniqueFd read_only_fd_;
  Mapping mapping_;
};

// A peer's region mapped into this process, read-only.
class MappedRegion {
 public:
  // Checks that the file is at least `bytes` long and sealed against shrinking before it maps.
  // Takes the descriptor.
  static Result<MappedRegion> Map(UniqueFd fd, uint64_t bytes);
  // Enters the next `bytes` into the page tables ahead of their first use, which would otherwise
  // cost a page fault each 64 KiB. False when nothing is left to do.
  bool PopulateNext(uint64_t bytes);
  const std::byte* data() const;
  uint64_t bytes() const;

 private:
  MappedRegion() = default;
  uint64_t bytes_ = 0;
  uint64_t populated_ = 0;
  Mapping mapping_;
};

}  // namespace kvrelay
