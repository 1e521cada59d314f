#include "kvcache/available_memory.h"

#include <gtest/gtest.h>

#include <cstdlib>
#include <filesystem>
#include <fstream>

namespace kvrelay {
namespace {

// A made-up /sys/fs/cgroup and /proc/self/cgroup.
class CgroupMemory : public ::testing::Test {
 protected:
  void SetUp() override {
    std::string name = (std::filesystem::temp_directory_path() / "kvrelay_cgroup_XXXXXX").string();
    ASSERT_NE(::mkdtemp(name.data()), nullptr);
    root_ = name;
  }
  void TearDown() override { std::filesystem::remove_all(root_); }

  void Write(const std::string& path, const std::string& text) {
    std::filesystem::create_directories((root_ / path).parent_path());
    std::ofstream(root_ / path) << text;
  }
  std::optional<uint64_t> Left() {
    return CgroupMemoryLeft((root_ / "self").string(), (root_ / "mount").string());
  }
  std::filesystem::path root_;
};

TEST_F(CgroupMemory, WithoutLimitsIsNothing) {
  EXPECT_EQ(Left(), std::nullopt);
  Write("self", "0::/pod\n");
  Write("mount/pod/memory.max", "max\n");
  Write("mount/pod/memory.current", "100\n");
  EXPECT_EQ(Left(), std::nullopt);
}

TEST_F(CgroupMemory, Version2CountsTheSmallestOfTheGroupsAround) {
  Write("self", "0::/pod/container\n");
  Write("mount/pod/container/memory.max", "5000\n");
  Write("mount/pod/container/memory.current", "1000\n");
  EXPECT_EQ(Left(), 4000U);
  Write("mount/pod/memory.max", "3000\n");
  Write("mount/pod/memory.current", "2500\n");
  EXPECT_EQ(Left(), 500U);
  Write("mount/pod/memory.stat", "anon 1\ninactive_file 700\nfile 900\n");
  EXPECT_EQ(Left(), 1200U);
  Write("mount/pod/memory.current", "9000\n");
  EXPECT_EQ(Left(), 0U);
}

TEST_F(CgroupMemory, ContainerSeesItsGroupAtTheMount) {
  Write("self", "0::/a/path/of/the/host\n");
  Write("mount/memory.max", "5000\n");
  Write("mount/memory.current", "1000\n");
  EXPECT_EQ(Left(), 4000U);
}

TEST_F(CgroupMemory, Version1) {
  Write("self", "9:name=systemd:/\n4:memory:/job\n0::/\n");
  Write("mount/memory/job/memory.limit_in_bytes", "5000\n");
  Write("mount/memory/job/memory.usage_in_bytes", "3000\n");
  Write("mount/memory/job/memory.stat", "inactive_file 1\ntotal_inactive_file 500\n");
  EXPECT_EQ(Left(), 2500U);
}

TEST(AvailableMemory, OfThisMachineIsSomething) { EXPECT_GT(AvailableMemory(), 1U << 20); }

}  // namespace
}  // namespace kvrelay
