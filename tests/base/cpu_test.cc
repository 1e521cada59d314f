#include "base/cpu.h"

#include <gtest/gtest.h>
#include <sched.h>

#include <filesystem>
#include <fstream>
#include <string>
#include <thread>

namespace kvrelay {
namespace {

// A folder that looks like /sys/fs/cgroup, and a file that looks like /proc/self/cgroup.
class FakeCgroup : public testing::Test {
 protected:
  FakeCgroup() {
    char name[] = "/tmp/kvrelay_cpu_test.XXXXXX";
    root_ = ::mkdtemp(name);
  }
  ~FakeCgroup() override { std::filesystem::remove_all(root_); }

  void Write(const std::string& path, const std::string& text) {
    const std::filesystem::path file = root_ / path;
    std::filesystem::create_directories(file.parent_path());
    std::ofstream(file) << text;
  }
  std::optional<double> Quota() { return CgroupCpuQuota(root_ / "self", root_ / "mount"); }

  std::filesystem::path root_;
};

TEST_F(FakeCgroup, VersionTwoQuota) {
  Write("self", "0::/pod/app\n");
  Write("mount/pod/app/cpu.max", "150000 100000\n");
  EXPECT_DOUBLE_EQ(Quota().value(), 1.5);
}

TEST_F(FakeCgroup, TheSmallestQuotaOnTheWayUpCounts) {
  Write("self", "0::/pod/app\n");
  Write("mount/pod/app/cpu.max", "max 100000\n");
  Write("mount/pod/cpu.max", "200000 100000\n");
  Write("mount/cpu.max", "400000 100000\n");
  EXPECT_DOUBLE_EQ(Quota().value(), 2.0);
}

TEST_F(FakeCgroup, VersionOneQuota) {
  Write("self", "7:memory:/docker/1f\n5:cpu,cpuacct:/docker/1f\n");
  Write("mount/cpu,cpuacct/docker/1f/cpu.cfs_quota_us", "300000\n");
  Write("mount/cpu,cpuacct/docker/1f/cpu.cfs_period_us", "100000\n");
  EXPECT_DOUBLE_EQ(Quota().value(), 3.0);
}

// In a container /proc names the host's path, while the mount's root is the container's own group.
TEST_F(FakeCgroup, PathsThatAreNotVisibleFallBackToTheMount) {
  Write("self", "5:cpu,cpuacct:/docker/1f\n");
  Write("mount/cpu/cpu.cfs_quota_us", "50000\n");
  Write("mount/cpu/cpu.cfs_period_us", "100000\n");
  EXPECT_DOUBLE_EQ(Quota().value(), 0.5);
}

TEST_F(FakeCgroup, NoLimitIsNoQuota) {
  EXPECT_FALSE(Quota().has_value());
  Write("self", "0::/\n4:cpuset:/\n1:cpu:/\ngarbage\n");
  Write("mount/cpu/cpu.cfs_quota_us", "-1\n");
  Write("mount/cpu/cpu.cfs_period_us", "100000\n");
  Write("mount/cpu.max", "max 100000\n");
  EXPECT_FALSE(Quota().has_value());
}

TEST(Cpu, AffinityLimitsTheThreads) {
  std::thread([] {
    EXPECT_GE(AvailableThreads(), 1);
    cpu_set_t before;
    ASSERT_EQ(::sched_getaffinity(0, sizeof(before), &before), 0);
    EXPECT_LE(AvailableThreads(), CPU_COUNT(&before));

    cpu_set_t one;
    CPU_ZERO(&one);
    CPU_SET(::sched_getcpu(), &one);
    ASSERT_EQ(::sched_setaffinity(0, sizeof(one), &one), 0);
    EXPECT_EQ(AvailableThreads(), 1);
  }).join();
}

TEST(Cpu, FeaturesAgreeWithTheKernel) {
  std::ifstream info("/proc/cpuinfo");
  std::string flags;
  while (std::getline(info, flags) && flags.rfind("flags", 0) != 0) {
  }
  flags += ' ';
  EXPECT_EQ(HasAvx2(), flags.find(" avx2 ") != std::string::npos);
  EXPECT_EQ(HasAvx512(), flags.find(" avx512vl ") != std::string::npos);
}

}  // namespace
}  // namespace kvrelay
