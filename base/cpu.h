// What this process may use of the machine's processors.
#pragma once

#include <optional>
#include <string>

namespace kvrelay {

// Threads that can run at once: the smaller of the affinity mask and the cgroup's CPU quota
// (versions 1 and 2, rounded up); at least 1. Read anew on each call.
int AvailableThreads();

// AVX2 with FMA and F16C, which came together.
bool HasAvx2();
// AVX-512 F, BW, DQ and VL: every server processor with AVX-512.
bool HasAvx512();

// For tests: the CPU quota, in processors, of the cgroup that `proc_self_cgroup` (a file like
// /proc/self/cgroup) names below `mount` (like /sys/fs/cgroup), and of the groups around it: the
// smallest counts. Nothing when there is no limit.
std::optional<double> CgroupCpuQuota(const std::string& proc_self_cgroup, const std::string& mount);

}  // namespace kvrelay
