// A registered span of memory and the handle by which another process on this host can map it,
// read-only.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>

#include "base/mapping.h"
#include "base/status.h"
#include "base/unique_fd.h"

namespace kvrelay {

enum class DeviceKind : uint8_t { kCpu = 0, kCuda = 1 };

// Memory that we allocated. Host memory is a memfd: CLOEXEC, MADV_DONTFORK, size sealed against
// shrink and grow (no SIGBUS by truncation), future writes through other mappings sealed. A GPU's
// comes from its Device (kvcache/device.h). Move-only; unmaps and closes in its destructor.
class Region {
 public:
  // Where memory lies and how others get at it, for people.
  struct Place {
    DeviceKind kind = DeviceKind::kCpu;
    std::string device = "cpu";
    std::string exported = "memfd";  // what export_fd() is
  };

  // `name` shows in /proc/*/maps. Rounds up to whole pages; zero-filled; asks for huge pages and
  // goes without. All of it is committed before the call returns, so that a shortage is an error
  // here: kResourceExhausted, with the bytes asked and available, and never a SIGBUS later.
  static Result<Region> AllocateHost(uint64_t bytes, const std::string& name);
  // Memory that another allocated: `data` is good for as long as `memory` is held.
  static Region Own(std::shared_ptr<const void> memory, std::byte* data, uint64_t bytes,
                    UniqueFd export_fd, Place place, std::string name);

  std::byte* data() const { return data_; }  // an address of place().device
  uint64_t bytes() const { return bytes_; }  // as asked
  const Place& place() const { return place_; }
  const std::string& name() const { return name_; }
  // A descriptor of the same memory, for SCM_RIGHTS: host memory's is opened read-only.
  int export_fd() const { return export_fd_.get(); }

 private:
  Region() = default;
  std::string name_;
  Place place_;
  uint64_t bytes_ = 0;
  std::byte* data_ = nullptr;
  UniqueFd export_fd_;
  std::shared_ptr<const void> memory_;
};

// A peer's region of host memory mapped into this process, read-only.
class MappedRegion {
 public:
  // Checks that the file is at least `bytes` long and sealed against shrinking before it maps.
  // Takes the descriptor.
  static Result<MappedRegion> Map(UniqueFd fd, uint64_t bytes);
  // Enters the next `bytes` into the page tables ahead of their first use, which would otherwise
  // cost a page fault each 64 KiB. False when nothing is left to do: at once where pages come and
  // go (kvcache/sparse_memory.h).
  bool PopulateNext(uint64_t bytes);
  // Else they come and go, and nothing may keep them (kvcache/sparse_memory.h).
  bool keeps_pages() const { return keeps_pages_; }
  const std::byte* data() const;
  uint64_t bytes() const;

 private:
  MappedRegion() = default;
  bool keeps_pages_ = false;
  uint64_t bytes_ = 0;
  uint64_t populated_ = 0;
  Mapping mapping_;
};

}  // namespace kvrelay
