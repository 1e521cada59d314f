#include "kvcache/sparse_memory.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>

#include <bit>
#include <cerrno>
#include <limits>
#include <utility>

#include "kvcache/available_memory.h"
#include "kvcache/memfd.h"

// Newer than some C libraries' headers.
#ifndef MADV_POPULATE_WRITE
#define MADV_POPULATE_WRITE 23
#endif

namespace kvrelay {

Result<std::unique_ptr<SparseMemory>> SparseMemory::Create(uint64_t bytes, uint64_t page_bytes,
                                                           const std::string& name) {
  if (!std::has_single_bit(page_bytes) || page_bytes < kLeastPageBytes ||
      page_bytes > kMostPageBytes) {
    return Error(Code::kInvalidArgument, "pages of " + std::to_string(page_bytes) +
                                             " bytes: host memory has powers of two from " +
                                             std::to_string(kLeastPageBytes) + " to " +
                                             std::to_string(kMostPageBytes));
  }
  if (bytes == 0 || bytes > std::numeric_limits<int64_t>::max() - page_bytes) {
    return Error(Code::kInvalidArgument,
                 "region " + name + " of " + std::to_string(bytes) + " bytes");
  }
  const uint64_t rounded = (bytes + page_bytes - 1) / page_bytes * page_bytes;
  KVRELAY_ASSIGN_OR_RETURN(UniqueFd fd, MakeMemfd(rounded, name));
  KVRELAY_ASSIGN_OR_RETURN(Mapping mapping, Mapping::Map(rounded, PROT_READ | PROT_WRITE,
                                                         MAP_SHARED | MAP_NORESERVE, fd.get()));
  if (::madvise(mapping.data(), rounded, MADV_DONTFORK) != 0) {
    return Error(SystemError("MADV_DONTFORK on region " + name, errno));
  }
  // Only a wish: kernels without huge pages for shared memory refuse it or do nothing.
  (void)::madvise(mapping.data(), rounded,
                  page_bytes == kMostPageBytes ? MADV_HUGEPAGE : MADV_NOHUGEPAGE);
  KVRELAY_RETURN_IF_ERROR(SealMemfd(fd.get(), Sealed::kSize));
  return std::unique_ptr<SparseMemory>(
      new SparseMemory(std::move(fd), std::move(mapping), page_bytes, name));
}

SparseMemory::SparseMemory(UniqueFd fd, Mapping mapping, uint64_t page_bytes, std::string name)
    : fd_(std::move(fd)),
      mapping_(std::make_shared<const Mapping>(std::move(mapping))),
      page_bytes_(page_bytes),
      name_(std::move(name)) {}

Result<Region> SparseMemory::AsRegion(uint64_t bytes) const {
  if (bytes > mapping_->bytes()) {
    return Error(Code::kInvalidArgument, "region " + name_ + " of " + std::to_string(bytes) +
                                             " bytes in a file of " +
                                             std::to_string(mapping_->bytes()));
  }
  KVRELAY_ASSIGN_OR_RETURN(UniqueFd read_only, ReopenReadOnly(fd_.get()));
  return Region::Own(mapping_, mapping_->data(), bytes, std::move(read_only),
                     {.kind = DeviceKind::kCpu, .device = "cpu", .exported = "sparse memfd"},
                     name_);
}

Status SparseMemory::Reserve(uint64_t pages) {
  if (pages > AvailableMemory() / page_bytes_) return NoMemory(name_, pages * page_bytes_);
  return Status::Ok();
}

Status SparseMemory::Map(uint64_t first, uint64_t count) {
  const uint64_t at = first * page_bytes_;
  const uint64_t length = count * page_bytes_;
  if (::madvise(mapping_->data() + at, length, MADV_POPULATE_WRITE) == 0) return Status::Ok();
  // Linux before 5.14 does not know the advice.
  if (errno == EINVAL &&
      ::fallocate(fd_.get(), 0, static_cast<off_t>(at), static_cast<off_t>(length)) == 0) {
    return Status::Ok();
  }
  // Some pages may have got theirs.
  Unmap(first, count);
  return NoMemory(name_, length);
}

void SparseMemory::Unmap(uint64_t first, uint64_t count) {
  (void)::fallocate(fd_.get(), FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE,
                    static_cast<off_t>(first * page_bytes_),
                    static_cast<off_t>(count * page_bytes_));
}

uint64_t SparseMemory::resident_bytes() const {
  constexpr uint64_t kUnit = 512;  // of st_blocks, whatever the file system's
  struct stat info = {};
  if (::fstat(fd_.get(), &info) != 0) return 0;
  return static_cast<uint64_t>(info.st_blocks) * kUnit;
}

}  // namespace kvrelay
