#include "kvcache/region.h"

#include <fcntl.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <fstream>

#include "tests/common/slowness.h"

namespace kvrelay {
namespace {

using ::testing::AllOf;
using ::testing::HasSubstr;

#ifndef F_SEAL_FUTURE_WRITE
#define F_SEAL_FUTURE_WRITE 0x0010
#endif

bool KernelSealsFutureWrites() {
  const UniqueFd fd(::memfd_create("probe", MFD_CLOEXEC | MFD_ALLOW_SEALING));
  return ::fcntl(fd.get(), F_ADD_SEALS, F_SEAL_FUTURE_WRITE) == 0;
}

UniqueFd Duplicate(int fd) { return UniqueFd(::fcntl(fd, F_DUPFD_CLOEXEC, 0)); }

TEST(Region, IsZeroFilledWritableAndNamed) {
  const auto region = Region::AllocateHost(10000, "kv rank 1");
  ASSERT_TRUE(region.has_value()) << region.error().ToString();
  EXPECT_EQ(region->bytes(), 10000U);
  EXPECT_EQ(region->name(), "kv rank 1");
  for (uint64_t i = 0; i < 10000; ++i) ASSERT_EQ(region->data()[i], std::byte{0});
  std::memset(region->data(), 7, 10000);

  std::ifstream maps("/proc/self/maps");
  const std::string text((std::istreambuf_iterator<char>(maps)), std::istreambuf_iterator<char>());
  EXPECT_THAT(text, HasSubstr("memfd:kv rank 1"));
}

TEST(Region, ALongNameIsNoError) {
  EXPECT_TRUE(Region::AllocateHost(1, std::string(1000, 'x')).has_value());
}

TEST(Region, IsSeenThroughAReadOnlyMapping) {
  const auto region = Region::AllocateHost(8192, "kv").value();
  const auto mapped = MappedRegion::Map(Duplicate(region.export_fd()), 8192);
  ASSERT_TRUE(mapped.has_value()) << mapped.error().ToString();
  EXPECT_EQ(mapped->bytes(), 8192U);
  region.data()[5000] = std::byte{42};
  EXPECT_EQ(mapped->data()[5000], std::byte{42});
}

TEST(Region, MappingOutlivesItsOwner) {
  Result<MappedRegion> mapped = [] {
    const auto region = Region::AllocateHost(4096, "kv").value();
    region.data()[7] = std::byte{9};
    return MappedRegion::Map(Duplicate(region.export_fd()), 4096);
  }();
  ASSERT_TRUE(mapped.has_value());
  EXPECT_EQ(mapped->data()[7], std::byte{9});
}

TEST(Region, ExportedDescriptorNeitherWritesNorTruncates) {
  const auto region = Region::AllocateHost(8192, "kv").value();
  const int fd = region.export_fd();
  EXPECT_EQ(::fcntl(fd, F_GETFL) & O_ACCMODE, O_RDONLY);
  EXPECT_NE(::fcntl(fd, F_GETFD) & FD_CLOEXEC, 0);
  EXPECT_EQ(::mmap(nullptr, 8192, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0), MAP_FAILED);
  EXPECT_EQ(errno, EACCES);
  EXPECT_NE(::ftruncate(fd, 0), 0);
  EXPECT_LT(::write(fd, "x", 1), 0);
  EXPECT_NE(::fallocate(fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, 0, 4096), 0);
}

TEST(Region, EvenReopenedForWritingItsSizeAndFutureWritesAreSealed) {
  const auto region = Region::AllocateHost(8192, "kv").value();
  const int seals = ::fcntl(region.export_fd(), F_GET_SEALS);
  EXPECT_EQ(seals & (F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_SEAL),
            F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_SEAL);
  const std::string path = "/proc/self/fd/" + std::to_string(region.export_fd());
  const UniqueFd writable(::open(path.c_str(), O_RDWR | O_CLOEXEC));
  if (!writable.valid()) GTEST_SKIP() << "this user may not reopen a memfd";
  EXPECT_NE(::ftruncate(writable.get(), 0), 0);
  EXPECT_NE(::ftruncate(writable.get(), 16384), 0);
  if (!KernelSealsFutureWrites()) GTEST_SKIP() << "this kernel lacks the seal";
  EXPECT_EQ(::mmap(nullptr, 8192, PROT_READ | PROT_WRITE, MAP_SHARED, writable.get(), 0),
            MAP_FAILED);
  EXPECT_EQ(errno, EPERM);
  EXPECT_LT(::write(writable.get(), "x", 1), 0);
  region.data()[0] = std::byte{1};  // ours goes on
}

TEST(Region, ChildProcessMapsTheDescriptorButDoesNotInheritTheMemory) {
  const auto region = Region::AllocateHost(8192, "kv").value();
  region.data()[8191] = std::byte{77};
  const pid_t child = ::fork();
  ASSERT_GE(child, 0);
  if (child == 0) {
    // MADV_DONTFORK: there is nothing at the parent's address.
    if (::msync(region.data(), 4096, MS_ASYNC) == 0 || errno != ENOMEM) ::_exit(1);
    const auto mapped = MappedRegion::Map(Duplicate(region.export_fd()), 8192);
    if (!mapped) ::_exit(2);
    if (mapped->data()[8191] != std::byte{77}) ::_exit(3);
    // Until the parent has written.
    for (int i = 0; i < 5000 && mapped->data()[0] != std::byte{55}; ++i) ::usleep(1000);
    ::_exit(mapped->data()[0] == std::byte{55} ? 0 : 4);
  }
  ::usleep(1000);
  region.data()[0] = std::byte{55};
  int status = 0;
  ASSERT_EQ(::waitpid(child, &status, 0), child);
  ASSERT_TRUE(WIFEXITED(status));
  EXPECT_EQ(WEXITSTATUS(status), 0);
}

TEST(Region, ShortageIsAnErrorWithBothNumbers) {
  for (const uint64_t bytes : {uint64_t{1} << 50, UINT64_MAX, UINT64_MAX - 4096}) {
    const auto region = Region::AllocateHost(bytes, "huge");
    ASSERT_FALSE(region.has_value());
    EXPECT_EQ(region.error().code(), Code::kResourceExhausted);
    EXPECT_THAT(region.error().message(),
                AllOf(HasSubstr("huge"), HasSubstr("asked " + std::to_string(bytes)),
                      HasSubstr("available ")));
  }
  EXPECT_EQ(Region::AllocateHost(0, "none").error().code(), Code::kInvalidArgument);
}

long MinorFaults() {
  rusage usage = {};
  ::getrusage(RUSAGE_SELF, &usage);
  return usage.ru_minflt;
}

TEST(MappedRegion, WhatIsPopulatedCostsNoFaultWhenItIsUsed) {
  constexpr uint64_t kBytes = (8 << 20) + 4096;
  const auto region = Region::AllocateHost(kBytes, "kv").value();
  auto mapped = MappedRegion::Map(Duplicate(region.export_fd()), kBytes).value();
  int steps = 1;
  while (mapped.PopulateNext(1 << 20)) ++steps;
  if (steps == 1) GTEST_SKIP() << "this kernel does not populate for reading";
  EXPECT_EQ(steps, 9) << "eight of a megabyte and the rest";
  EXPECT_FALSE(mapped.PopulateNext(1 << 20));
  if (tests::Slowness() > 1) return;  // sanitizers have faults of their own
  const long before = MinorFaults();
  const volatile std::byte* data = mapped.data();
  for (uint64_t at = 0; at < kBytes; at += 4096) (void)data[at];
  EXPECT_LT(MinorFaults() - before, 8) << "unpopulated, at least one each 64 KiB: 129";
}

TEST(MappedRegion, RefusesFilesThatAreTooShort) {
  const auto region = Region::AllocateHost(4096, "kv").value();
  const auto mapped = MappedRegion::Map(Duplicate(region.export_fd()), 4097);
  ASSERT_FALSE(mapped.has_value());
  EXPECT_EQ(mapped.error().code(), Code::kInvalidArgument);
  EXPECT_THAT(mapped.error().message(), AllOf(HasSubstr("4096"), HasSubstr("4097")));
}

TEST(MappedRegion, RefusesWhatItsOwnerCouldTruncate) {
  UniqueFd unsealed(::memfd_create("unsealed", MFD_CLOEXEC | MFD_ALLOW_SEALING));
  ASSERT_EQ(::ftruncate(unsealed.get(), 4096), 0);
  EXPECT_THAT(MappedRegion::Map(std::move(unsealed), 4096).error().message(),
              HasSubstr("not sealed"));
  EXPECT_FALSE(MappedRegion::Map(UniqueFd(::open("/proc/self/exe", O_RDONLY)), 1).has_value());
  EXPECT_FALSE(MappedRegion::Map(UniqueFd(::open("/dev/zero", O_RDONLY)), 1).has_value());
  EXPECT_FALSE(MappedRegion::Map(UniqueFd(), 1).has_value());
}

}  // namespace
}  // namespace kvrelay
