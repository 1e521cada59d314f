// The control groups that this process is in.
#pragma once

#include <functional>
#include <string>
#include <string_view>

namespace kvrelay {

enum class CgroupVersion { k1, k2 };

// visit(folder, version) for the group of `controller` ("cpu", "memory") that `proc_self_cgroup` (a
// file like /proc/self/cgroup) names below `mount` (like /sys/fs/cgroup), and for the groups around
// it. A container often sees its group mounted as the root while /proc names the host's path, so
// folders that do not exist are among them.
void ForEachCgroup(const std::string& proc_self_cgroup, const std::string& mount,
                   std::string_view controller,
                   const std::function<void(const std::string&, CgroupVersion)>& visit);

}  // namespace kvrelay
