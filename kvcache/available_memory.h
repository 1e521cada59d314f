// How much memory this process can still take before the kernel would have to kill somebody.
#pragma once

#include <cstdint>
#include <optional>
#include <string>

namespace kvrelay {

// Bytes: the smaller of what the machine has available and what the limits of the process's cgroups
// (versions 1 and 2) leave. Read anew on each call; other processes may take it meanwhile.
// UINT64_MAX when the system does not tell.
uint64_t AvailableMemory();

// For tests: what the memory limits of the cgroup that `proc_self_cgroup` (a file like
// /proc/self/cgroup) names below `mount` (like /sys/fs/cgroup), and of the groups around it, leave;
// page cache that can be dropped counts as left. Nothing when there is no limit.
std::optional<uint64_t> CgroupMemoryLeft(const std::string& proc_self_cgroup,
                                         const std::string& mount);

}  // namespace kvrelay
