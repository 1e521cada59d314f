#include "base/mapping.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <sys/mman.h>

#include <cstring>
#include <utility>

#include "base/unique_fd.h"

namespace kvrelay {
namespace {

constexpr int kReadWrite = PROT_READ | PROT_WRITE;
constexpr int kAnonymous = MAP_PRIVATE | MAP_ANONYMOUS;

bool IsMapped(void* page) {
  unsigned char resident = 0;
  return ::mincore(page, 1, &resident) == 0;
}

TEST(Mapping, HoldsZeroedMemoryUntilItsEnd) {
  void* address = nullptr;
  {
    Result<Mapping> mapping = Mapping::Map(10'000, kReadWrite, kAnonymous, -1);
    ASSERT_TRUE(mapping.has_value()) << mapping.error().ToString();
    address = mapping->data();
    EXPECT_EQ(mapping->bytes(), 10'000U);
    EXPECT_EQ(mapping->data()[9'999], std::byte{0});
    EXPECT_TRUE(IsMapped(address));
  }
  EXPECT_FALSE(IsMapped(address));
}

TEST(Mapping, OutlivesItsDescriptor) {
  Result<Mapping> writer;
  Result<Mapping> reader;
  {
    const UniqueFd fd(::memfd_create("mapping_test", MFD_CLOEXEC));
    ASSERT_EQ(::ftruncate(fd.get(), 4096), 0);
    writer = Mapping::Map(4096, kReadWrite, MAP_SHARED, fd.get());
    reader = Mapping::Map(4096, PROT_READ, MAP_SHARED, fd.get());
  }
  ASSERT_TRUE(writer.has_value() && reader.has_value());
  std::memcpy(writer->data(), "shared", 7);
  EXPECT_STREQ(reinterpret_cast<const char*>(reader->data()), "shared");
}

TEST(Mapping, MovesWithoutUnmapping) {
  Mapping a = Mapping::Map(4096, kReadWrite, kAnonymous, -1).value();
  void* address = a.data();
  Mapping b(std::move(a));
  EXPECT_FALSE(a.valid());
  EXPECT_EQ(b.data(), address);
  b = Mapping::Map(4096, kReadWrite, kAnonymous, -1).value();
  EXPECT_NE(b.data(), address);
  EXPECT_FALSE(IsMapped(address));
}

TEST(Mapping, FailuresNameTheBytes) {
  EXPECT_EQ(Mapping::Map(0, kReadWrite, kAnonymous, -1).error().code(), Code::kInvalidArgument);

  const Status bad_fd = Mapping::Map(4096, PROT_READ, MAP_SHARED, 12345).error();
  EXPECT_EQ(bad_fd.code(), Code::kInternal);
  EXPECT_THAT(bad_fd.message(), testing::HasSubstr("cannot map 4096 bytes: Bad file descriptor"));

  const Status too_large = Mapping::Map(size_t{1} << 60, kReadWrite, kAnonymous, -1).error();
  EXPECT_EQ(too_large.code(), Code::kResourceExhausted);
}

}  // namespace
}  // namespace kvrelay
