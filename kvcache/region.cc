#include "kvcache/region.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <cstring>
#include <limits>
#include <utility>

#include "base/parallel.h"
#include "kvcache/available_memory.h"

// Newer than some C libraries' headers.
#ifndef MADV_POPULATE_WRITE
#define MADV_POPULATE_READ 22
#define MADV_POPULATE_WRITE 23
#endif
#ifndef F_SEAL_FUTURE_WRITE
#define F_SEAL_FUTURE_WRITE 0x0010
#endif

namespace kvrelay {
namespace {

constexpr size_t kMaxNameBytes = 200;  // memfd_create takes 249
constexpr size_t kCommitGrain = size_t{64}
                                << 20;  // bytes one thread commits at a time, about 20 ms

Status NoMemory(const std::string& name, uint64_t bytes) {
  return Error(Code::kResourceExhausted, "not enough memory for region " + name + ": asked " +
                                             std::to_string(bytes) + " bytes, available " +
                                             std::to_string(AvailableMemory()));
}

Status SystemError(const std::string& what, int error) {
  const bool shortage = error == ENOMEM || error == ENOSPC || error == EMFILE || error == ENFILE;
  return Error(shortage ? Code::kResourceExhausted : Code::kInternal,
               what + ": " + std::strerror(error));
}

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

Status Seal(int fd) {
  const int seals = F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_SEAL;
  // Linux before 5.1 does not know F_SEAL_FUTURE_WRITE. Without it the read-only descriptor still
  // guards against accidents.
  if (::fcntl(fd, F_ADD_SEALS, seals | F_SEAL_FUTURE_WRITE) == 0) return Status::Ok();
  if (errno == EINVAL && ::fcntl(fd, F_ADD_SEALS, seals) == 0) return Status::Ok();
  return SystemError("cannot seal a memfd", errno);
}

}  // namespace

Result<Region> Region::AllocateHost(uint64_t bytes, const std::string& name) {
  if (bytes == 0) return Error(Code::kInvalidArgument, "region " + name + " of 0 bytes");
  const auto page = static_cast<uint64_t>(::sysconf(_SC_PAGESIZE));
  if (bytes > AvailableMemory() || bytes > std::numeric_limits<int64_t>::max() - page) {
    return Error(NoMemory(name, bytes));
  }
  const uint64_t rounded = (bytes + page - 1) / page * page;

  const UniqueFd fd(
      ::memfd_create(name.substr(0, kMaxNameBytes).c_str(), MFD_CLOEXEC | MFD_ALLOW_SEALING));
  if (!fd.valid()) return Error(SystemError("memfd_create for region " + name, errno));
  if (::ftruncate(fd.get(), static_cast<off_t>(rounded)) != 0) {
    return Error(SystemError(
        "cannot size region " + name + " to " + std::to_string(rounded) + " bytes", errno));
  }
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
  KVRELAY_RETURN_IF_ERROR(Seal(fd.get()));
  const std::string path = "/proc/self/fd/" + std::to_string(fd.get());
  UniqueFd read_only(::open(path.c_str(), O_RDONLY | O_CLOEXEC));
  if (!read_only.valid()) {
    return Error(SystemError("cannot reopen " + path + " read-only", errno));
  }
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
