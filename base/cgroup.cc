#include "base/cgroup.h"

#include <fstream>
#include <sstream>

namespace kvrelay {
namespace {

using Visit = std::function<void(const std::string&, CgroupVersion)>;

bool Names(const std::string& controllers, std::string_view controller) {
  std::istringstream list(controllers);
  for (std::string one; std::getline(list, one, ',');) {
    if (one == controller) return true;
  }
  return false;
}

// From the group up to the mount.
void Climb(const std::string& mount, std::string path, CgroupVersion version, const Visit& visit) {
  while (true) {
    if (path == "/") path.clear();
    visit(mount + path, version);
    if (path.empty()) return;
    path.resize(path.rfind('/'));
  }
}

}  // namespace

void ForEachCgroup(const std::string& proc_self_cgroup, const std::string& mount,
                   std::string_view controller, const Visit& visit) {
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
      Climb(mount, path, CgroupVersion::k2, visit);
    } else if (Names(controllers, controller)) {
      Climb(mount + "/" + controllers, path, CgroupVersion::k1, visit);
      if (controllers != controller) {
        Climb(mount + "/" + std::string(controller), path, CgroupVersion::k1, visit);
      }
    }
  }
}

}  // namespace kvrelay
