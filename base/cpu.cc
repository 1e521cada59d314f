#include "base/cpu.h"

#include <cpuid.h>
#include <sched.h>

#include <algorithm>
#include <cmath>
#include <fstream>
#include <sstream>
#include <thread>

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

bool NamesCpu(const std::string& controllers) {
  std::istringstream list(controllers);
  for (std::string one; std::getline(list, one, ',');) {
    if (one == "cpu") return true;
  }
  return false;
}

void KeepSmaller(std::optional<double>& smallest, std::optional<double> quota) {
  if (quota && (!smallest || *quota < *smallest)) smallest = quota;
}

// From the group up to the mount. A container often sees its group mounted as the root while /proc
// names the host's path: folders that do not exist are passed over.
template <typename Quota>
void Climb(const std::string& mount, std::string path, Quota quota, std::optional<double>& result) {
  while (true) {
    if (path == "/") path.clear();
    KeepSmaller(result, quota(mount + path));
    if (path.empty()) return;
    path.resize(path.rfind('/'));
  }
}

}  // namespace

std::optional<double> CgroupCpuQuota(const std::string& proc_self_cgroup,
                                     const std::string& mount) {
  std::optional<double> smallest;
  std::ifstream groups(proc_self_cgroup);
  // "0::/path" (version 2), "5:cpu,cpuacct:/path" (version 1)
  for (std::string line; std::getline(groups, line);) {
    const size_t first = line.find(':');
    const size_t second = line.find(':', first + 1);
    if (first == std::string::npos || second == std::string::npos) continue;
    const std::string controllers = line.substr(first + 1, second - first - 1);
    const std::string path = line.substr(second + 1);
    if (path.empty() || path[0] != '/') continue;
    if (controllers.empty()) {
      Climb(mount, path, QuotaV2, smallest);
    } else if (NamesCpu(controllers)) {
      Climb(mount + "/" + controllers, path, QuotaV1, smallest);
      Climb(mount + "/cpu", path, QuotaV1, smallest);
    }
  }
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
