// A sparse file as backing of a virtual KV cache on the host.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>

#include "base/mapping.h"
#include "base/status.h"
#include "base/unique_fd.h"
#include "kvcache/page_backing.h"
#include "kvcache/region.h"

namespace kvrelay {

// One memfd, mapped once: the offset in the file is the offset in memory, so that the kernel keeps
// a single mapping whatever pages come and go, here and in peers, which map the file once. A page
// gets memory by being touched ahead of its use and loses it by a hole that is punched into the
// file. Its size is sealed; its pages are not.
class SparseMemory final : public PageBacking {
 public:
  static constexpr uint64_t kLeastPageBytes = uint64_t{64} << 10;
  static constexpr uint64_t kMostPageBytes = uint64_t{2} << 20;

  // `page_bytes`: a power of two from 64 KiB to 2 MiB, else kInvalidArgument. Rounds `bytes` up to
  // whole pages. Huge pages are asked for where a page is one, and else declined: they would give
  // neighbours memory.
  static Result<std::unique_ptr<SparseMemory>> Create(uint64_t bytes, uint64_t page_bytes,
                                                      const std::string& name);

  // The same memory as a region of `bytes`, for registration: it stays mapped as long as one of the
  // two is there.
  Result<Region> AsRegion(uint64_t bytes) const;

  std::byte* data() const override { return mapping_->data(); }
  uint64_t bytes() const override { return mapping_->bytes(); }
  uint64_t page_bytes() const override { return page_bytes_; }
  Status Reserve(uint64_t pages) override;
  Status Map(uint64_t first, uint64_t count) override;
  void Unmap(uint64_t first, uint64_t count) override;
  uint64_t resident_bytes() const override;

 private:
  SparseMemory(UniqueFd fd, Mapping mapping, uint64_t page_bytes, std::string name);

  const UniqueFd fd_;
  const std::shared_ptr<const Mapping> mapping_;
  const uint64_t page_bytes_;
  const std::string name_;
};

}  // namespace kvrelay
