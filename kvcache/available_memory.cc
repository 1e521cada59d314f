#include "kvcache/available_memory.h"

#include <algorithm>
#include <fstream>
#include <sstream>
#include <string_view>

namespace kvrelay {
namespace {

// Where a version keeps its numbers.
struct Files {
  std::string_view limit;
  std::string_view usage;
  std::string_view droppable;  // in memory.stat
};
constexpr Files kV1 = {"memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"};
constexpr Files kV2 = {"memory.max", "memory.current", "inactive_file"};

// The value after `key` in a file of lines "key value ...".
std::optional<uint64_t> ValueOf(const std::string& path, std::string_view key) {
  std::ifstream file(path);
  for (std::string line; std::getline(file, line);) {
    std::istringstream words(line);
    std::string name;
    uint64_t value = 0;
    if (words >> name >> value && name == key) return value;
  }
  return std::nullopt;
}

// A file of one number. "max" is none.
std::optional<uint64_t> Number(const std::string& path) {
  std::ifstream file(path);
  uint64_t value = 0;
  if (file >> value) return value;
  return std::nullopt;
}

std::optional<uint64_t> LeftIn(const std::string& group, const Files& files) {
  const auto limit = Number(group + "/" + std::string(files.limit));
  const auto usage = Number(group + "/" + std::string(files.usage));
  if (!limit || !usage) return std::nullopt;
  const uint64_t droppable = ValueOf(group + "/memory.stat", files.droppable).value_or(0);
  const uint64_t used = *usage - std::min(*usage, droppable);
  return *limit - std::min(*limit, used);
}

// From the group up to the mount. A container often sees its group mounted as the root while /proc
// names the host's path: folders that do not exist are passed over.
void Climb(const std::string& mount, std::string path, const Files& files,
           std::optional<uint64_t>& least) {
  while (true) {
    if (path == "/") path.clear();
    const auto left = LeftIn(mount + path, files);
    if (left && (!least || *left < *least)) least = left;
    if (path.empty()) return;
    path.resize(path.rfind('/'));
  }
}

bool NamesMemory(const std::string& controllers) {
  std::istringstream list(controllers);
  for (std::string one; std::getline(list, one, ',');) {
    if (one == "memory") return true;
  }
  return false;
}

}  // namespace

std::optional<uint64_t> CgroupMemoryLeft(const std::string& proc_self_cgroup,
                                         const std::string& mount) {
  std::optional<uint64_t> least;
  std::ifstream groups(proc_self_cgroup);
  // "0::/path" (version 2), "4:memory:/path" (version 1)
  for (std::string line; std::getline(groups, line);) {
    const size_t first = line.find(':');
    const size_t second = line.find(':', first + 1);
    if (first == std::string::npos || second == std::string::npos) continue;
    const std::string controllers = line.substr(first + 1, second - first - 1);
    const std::string path = line.substr(second + 1);
    if (path.empty() || path[0] != '/') continue;
    if (controllers.empty()) Climb(mount, path, kV2, least);
    if (NamesMemory(controllers)) Climb(mount + "/" + controllers, path, kV1, least);
  }
  return least;
}

uint64_t AvailableMemory() {
  uint64_t available = UINT64_MAX;
  if (const auto kib = ValueOf("/proc/meminfo", "MemAvailable:")) available = *kib * 1024;
  const auto left = CgroupMemoryLeft("/proc/self/cgroup", "/sys/fs/cgroup");
  return std::min(available, left.value_or(UINT64_MAX));
}

}  // namespace kvrelay
