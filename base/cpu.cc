#include "base/cpu.h"

#include <cpuid.h>
#include <sched.h>

#include <algorithm>
#include <cmath>
#include <fstream>
#include <thread>

#include "base/cgroup.h"

namespace kvrelay {
namespace {

int AffinityThreads() {
  // The kernel's mask can be wider than cpu_set_t's 1024 bits: grow until it fits.
  for (size_t cpus = CPU_SETSIZE; cpus <= (1U << 20); cpus *= 2) {
    cpu_set_t* set = CPU_ALLOC(cpus);
    const size_t bytes = CPU_ALLOC_SIZE(cpus);
    const bool fits = ::sched_getaffinity(0, bytes, set) == 0;
    const int count = fits ? CPU_COUNT_S(bytes, set) : 0;
    CPU_FREE(set);
    if (fits) return std::max(1, count);
  }
  return static_cast<int>(std::max(1U, std::thread::hardware_concurrency()));
}

// "max 100000" or "50000 100000" (version 2).
std::optional<double> QuotaV2(const std::string& folder) {
  std::ifstream file(folder + "/cpu.max");
  double quota = 0;
  double period = 0;
  if (!(file >> quota >> period) || period <= 0) return std::nullopt;
  return quota / period;
}

// Two files; a quota of -1 is none (version 1).
std::optional<double> QuotaV1(const std::string& folder) {
  std::ifstream quota_file(folder + "/cpu.cfs_quota_us");
  std::ifstream period_file(folder + "/cpu.cfs_period_us");
  double quota = 0;
  double period = 0;
  if (!(quota_file >> quota) || !(period_file >> period)) return std::nullopt;
  if (quota <= 0 || period <= 0) return std::nullopt;
  return quota / period;
}

}  // namespace

std::optional<double> CgroupCpuQuota(const std::string& proc_self_cgroup,
                                     const std::string& mount) {
  std::optional<double> smallest;
  ForEachCgroup(proc_self_cgroup, mount, "cpu",
                [&smallest](const std::string& folder, CgroupVersion version) {
                  const auto quota =
                      version == CgroupVersion::k2 ? QuotaV2(folder) : QuotaV1(folder);
                  if (quota && (!smallest || *quota < *smallest)) smallest = quota;
                });
  return smallest;
}

int AvailableThreads() {
  const int affinity = AffinityThreads();
  const std::optional<double> quota = CgroupCpuQuota("/proc/self/cgroup", "/sys/fs/cgroup");
  if (!quota) return affinity;
  // A small excess (2.01 processors) is not worth a third thread.
  return std::clamp(static_cast<int>(std::ceil(*quota - 0.05)), 1, affinity);
}

bool HasAvx2() {
  // Clang 14 has no name for F16C in the builtin, which also asks whether the system saves the wide
  // registers.
  unsigned eax = 0;
  unsigned ebx = 0;
  unsigned ecx = 0;
  unsigned edx = 0;
  const bool f16c = __get_cpuid(1, &eax, &ebx, &ecx, &edx) != 0 && (ecx & bit_F16C) != 0;
  return f16c && __builtin_cpu_supports("avx2") != 0 && __builtin_cpu_supports("fma") != 0;
}

bool HasAvx512() {
  return __builtin_cpu_supports("avx512f") != 0 && __builtin_cpu_supports("avx512bw") != 0 &&
         __builtin_cpu_supports("avx512dq") != 0 && __builtin_cpu_supports("avx512vl") != 0;
}

}  // namespace kvrelay
