#include "kvcache/sparse_memory.h"

#include <fcntl.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <vector>

#include "tests/kvcache/resident.h"

namespace kvrelay {
namespace {

using ::testing::AllOf;
using ::testing::HasSubstr;
using testing_support::ResidentOf;

constexpr uint64_t kFilePage = 1 << 16;

std::unique_ptr<SparseMemory> SparsePages(uint64_t pages, const std::string& name) {
  auto memory = SparseMemory::Create(pages * kFilePage, kFilePage, name);
  EXPECT_TRUE(memory.has_value()) << memory.error().ToString();
  return std::move(memory).value();
}

// A peer's, of the exported descriptor.
MappedRegion MappedBy(const Region& region) {
  return MappedRegion::Map(UniqueFd(::dup(region.export_fd())), region.bytes()).value();
}

TEST(SparseMemory, PagesGetMemoryAndLoseIt) {
  const auto memory = SparsePages(1024, "sparse-1");
  EXPECT_EQ(memory->resident_bytes(), 0U);
  ASSERT_TRUE(memory->Map(10, 5).ok());
  EXPECT_EQ(memory->resident_bytes(), 5 * kFilePage);
  EXPECT_EQ(ResidentOf("sparse-1").bytes, 5 * kFilePage) << "committed ahead of use";
  std::memset(memory->data() + 10 * kFilePage, 7, 5 * kFilePage);

  memory->Unmap(11, 2);
  EXPECT_EQ(memory->resident_bytes(), 3 * kFilePage);
  EXPECT_EQ(ResidentOf("sparse-1").bytes, 3 * kFilePage);
  for (const uint64_t page : {10, 13, 14}) {
    EXPECT_EQ(memory->data()[page * kFilePage + kFilePage - 1], std::byte{7}) << "page " << page;
  }
  memory->Unmap(0, 1024);
  EXPECT_EQ(memory->resident_bytes(), 0U);
  EXPECT_EQ(ResidentOf("sparse-1").bytes, 0U);
}

// A mapping for each page would end at vm.max_map_count, 65530.
TEST(SparseMemory, IsOneMappingWhateverPagesItHas) {
  const auto memory = SparsePages(1024, "sparse-2");
  for (uint64_t page = 0; page < 1024; page += 2) ASSERT_TRUE(memory->Map(page, 1).ok());
  for (uint64_t page = 0; page < 1024; page += 4) memory->Unmap(page, 1);
  const auto resident = ResidentOf("sparse-2");
  EXPECT_EQ(resident.mappings, 1U);
  EXPECT_EQ(resident.bytes, 256 * kFilePage);
}

TEST(SparseMemory, EveryPageSizeOfTheHostWorks) {
  for (uint64_t page = kFilePage; page <= uint64_t{2} << 20; page *= 2) {
    auto memory = SparseMemory::Create(8 * page, page, "sparse-3").value();
    ASSERT_TRUE(memory->Map(3, 2).ok());
    EXPECT_EQ(memory->resident_bytes(), 2 * page);
    memory->Unmap(4, 1);
    EXPECT_EQ(memory->resident_bytes(), page);
  }
  for (const uint64_t page : {uint64_t{4096}, uint64_t{100000}, uint64_t{4} << 20}) {
    EXPECT_THAT(
        SparseMemory::Create(kFilePage, page, "sparse-3").error().ToString(),
        AllOf(HasSubstr("kInvalidArgument"), HasSubstr(std::to_string(page)), HasSubstr("65536")));
  }
}

TEST(SparseMemory, MoreThanTheMachineHasIsRefused) {
  const auto memory = SparsePages(1, "sparse-4");
  EXPECT_EQ(memory->Reserve(uint64_t{1} << 40).code(), Code::kResourceExhausted);
  EXPECT_TRUE(memory->Reserve(1).ok());
}

TEST(SparseMemory, APeerMapsTheFileOnceAndGivesNoPageMemory) {
  const auto memory = SparsePages(64, "sparse-5");
  const Region region = memory->AsRegion(64 * kFilePage).value();
  EXPECT_EQ(region.place().exported, "sparse memfd");
  MappedRegion peer = MappedBy(region);
  EXPECT_FALSE(peer.PopulateNext(1 << 20)) << "pages come and go: there is nothing to enter";
  EXPECT_EQ(memory->resident_bytes(), 0U);

  ASSERT_TRUE(memory->Map(5, 2).ok());
  std::memset(memory->data() + 5 * kFilePage, 9, 2 * kFilePage);
  EXPECT_EQ(peer.data()[6 * kFilePage], std::byte{9});
  memory->Unmap(6, 1);
  EXPECT_EQ(peer.data()[5 * kFilePage], std::byte{9});
  EXPECT_EQ(memory->resident_bytes(), kFilePage);
  // The reason why nobody reads outside a live lease, and why the owner counts again.
  EXPECT_EQ(peer.data()[6 * kFilePage], std::byte{0});
  EXPECT_GT(memory->resident_bytes(), kFilePage);
  memory->Unmap(6, 1);
  EXPECT_EQ(memory->resident_bytes(), kFilePage);
}

TEST(SparseMemory, AnotherProcessReadsItAndCanNotTakePages) {
  const auto memory = SparsePages(4, "sparse-6");
  const Region region = memory->AsRegion(4 * kFilePage).value();
  ASSERT_TRUE(memory->Map(2, 1).ok());
  memory->data()[2 * kFilePage] = std::byte{42};
  const pid_t child = ::fork();
  if (child == 0) {
    const auto peer = MappedRegion::Map(UniqueFd(::dup(region.export_fd())), region.bytes());
    if (!peer || peer->data()[2 * kFilePage] != std::byte{42}) ::_exit(1);
    constexpr int kPunch = FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE;
    if (::fallocate(region.export_fd(), kPunch, 0, kFilePage) == 0) ::_exit(2);
    if (::ftruncate(region.export_fd(), 0) == 0) ::_exit(3);
    ::_exit(0);
  }
  int status = -1;
  ASSERT_EQ(::waitpid(child, &status, 0), child);
  EXPECT_EQ(status, 0);
  EXPECT_EQ(memory->resident_bytes(), kFilePage);
}

TEST(SparseMemory, ARegionOutlivesWhatItWasMadeFrom) {
  auto memory = SparsePages(2, "sparse-7");
  const Region region = memory->AsRegion(kFilePage + 1).value();
  EXPECT_FALSE(memory->AsRegion(2 * kFilePage + 1).has_value());
  ASSERT_TRUE(memory->Map(0, 1).ok());
  memory.reset();
  region.data()[7] = std::byte{1};
  EXPECT_EQ(MappedBy(region).data()[7], std::byte{1});
}

}  // namespace
}  // namespace kvrelay
