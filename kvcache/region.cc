#include "kvcache/region.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <limits>
#include <utility>

#include "base/parallel.h"
#include "kvcache/available_memory.h"
#include "kvcache/memfd.h"

// Newer than some C libraries' headers.
#ifndef MADV_POPULATE_WRITE
#define MADV_POPULATE_READ 22
#define MADV_POPULATE_WRITE 23
#endif

namespace kvrelay {
namespace {

constexpr size_t kCommitGrain = size_t{64}
                                << 20;  // bytes one thread commits at a time, about 20 ms

// Gives every page its memory now: a memfd without it is a promise that ends in SIGBUS (and, until
// then, in a page fault at each page's first use). False when there is not enough.
bool Commit(std::byte* data, uint64_t bytes, int fd) {
  std::atomic<int> error = 0;
  ParallelFor(bytes, kCommitGrain, [&](size_t begin, size_t end) {
    if (::madvise(data + begin, end - begin, MADV_POPULATE_WRITE) != 0) error = errno;
  });
  if (error == 0) return true;
  // Linux before 5.14 does not know the advice.
  return error == EINVAL && ::fallocate(fd, 0, 0, static_cast<off_t>(bytes)) == 0;
}

}  // namespace

Result<Region> Region::AllocateHost(uint64_t bytes, const std::string& name) {
  if (bytes == 0) return Error(Code::kInvalidArgument, "region " + name + " of 0 bytes");
  const auto page = static_cast<uint64_t>(::sysconf(_SC_PAGESIZE));
  if (bytes > AvailableMemory() || bytes > std::numeric_limits<int64_t>::max() - page) {
    return Error(NoMemory(name, bytes));
  }
  const uint64_t rounded = (bytes + page - 1) / page * page;

  KVRELAY_ASSIGN_OR_RETURN(const UniqueFd fd, MakeMemfd(rounded, name));
  auto mapping = std::make_shared<Mapping>();
  KVRELAY_ASSIGN_OR_RETURN(*mapping,
                           Mapping::Map(rounded, PROT_READ | PROT_WRITE, MAP_SHARED, fd.get()));
  std::byte* const data = mapping->data();
  if (::madvise(data, rounded, MADV_DONTFORK) != 0) {
    return Error(SystemError("MADV_DONTFORK on region " + name, errno));
  }
  // Only a wish: kernels without huge pages for shared memory refuse it or do nothing.
  (void)::madvise(data, rounded, MADV_HUGEPAGE);
  if (!Commit(data, rounded, fd.get())) return Error(NoMemory(name, bytes));
  // After the mapping, which stays writable; the writable descriptor closes with this function.
  KVRELAY_RETURN_IF_ERROR(SealMemfd(fd.get(), Sealed::kSizeAndPages));
  KVRELAY_ASSIGN_OR_RETURN(UniqueFd read_only, ReopenReadOnly(fd.get()));
  return Own(std::move(mapping), data, bytes, std::move(read_only), {}, name);
}

Region Region::Own(std::shared_ptr<const void> memory, std::byte* data, uint64_t bytes,
                   UniqueFd export_fd, Place place, std::string name) {
  Region region;
  region.name_ = std::move(name);
  region.place_ = std::move(place);
  region.bytes_ = bytes;
  region.data_ = data;
  region.export_fd_ = std::move(export_fd);
  region.memory_ = std::move(memory);
  return region;
}

Result<MappedRegion> MappedRegion::Map(UniqueFd fd, uint64_t bytes) {
  struct stat info = {};
  if (::fstat(fd.get(), &info) != 0) {
    return Error(SystemError("cannot look at a peer's region", errno));
  }
  if (info.st_size < 0 || static_cast<uint64_t>(info.st_size) < bytes) {
    return Error(Code::kInvalidArgument, "a peer's region has " + std::to_string(info.st_size) +
                                             " bytes, " + std::to_string(bytes) +
                                             " were announced");
  }
  // Without the seal the peer could take pages away while we read them: SIGBUS.
  const int seals = ::fcntl(fd.get(), F_GET_SEALS);
  if (seals < 0 || (seals & F_SEAL_SHRINK) == 0) {
    return Error(Code::kInvalidArgument,
                 "a peer's region is not sealed against shrinking (no memfd, or not one of ours)");
  }
  MappedRegion region;
  region.bytes_ = bytes;
  region.keeps_pages_ = KeepsPages(fd.get());
  if (!region.keeps_pages_) region.populated_ = bytes;
  KVRELAY_ASSIGN_OR_RETURN(region.mapping_, Mapping::Map(bytes, PROT_READ, MAP_SHARED, fd.get()));
  if (::madvise(region.mapping_.data(), bytes, MADV_DONTFORK) != 0) {
    return Error(SystemError("MADV_DONTFORK on a peer's region", errno));
  }
  return region;
}

bool MappedRegion::PopulateNext(uint64_t bytes) {
  const uint64_t step = std::min(bytes, mapping_.bytes() - populated_);
  // Linux before 5.14 does not know the advice: then pages come when they are used.
  if (step == 0 || ::madvise(mapping_.data() + populated_, step, MADV_POPULATE_READ) != 0) {
    populated_ = mapping_.bytes();
    return false;
  }
  populated_ += step;
  return populated_ < mapping_.bytes();
}

const std::byte* MappedRegion::data() const { return mapping_.data(); }

uint64_t MappedRegion::bytes() const { return bytes_; }

}  // namespace kvrelay
