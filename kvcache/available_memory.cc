#include "kvcache/available_memory.h"

#include <algorithm>
#include <fstream>
#include <sstream>
#include <string_view>

#include "base/cgroup.h"

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

}  // namespace

std::optional<uint64_t> CgroupMemoryLeft(const std::string& proc_self_cgroup,
                                         const std::string& mount) {
  std::optional<uint64_t> least;
  ForEachCgroup(proc_self_cgroup, mount, "memory",
                [&least](const std::string& folder, CgroupVersion version) {
                  const auto left = LeftIn(folder, version == CgroupVersion::k2 ? kV2 : kV1);
                  if (left && (!least || *left < *least)) least = left;
                });
  return least;
}

uint64_t AvailableMemory() {
  uint64_t available = UINT64_MAX;
  if (const auto kib = ValueOf("/proc/meminfo", "MemAvailable:")) available = *kib * 1024;
  const auto left = CgroupMemoryLeft("/proc/self/cgroup", "/sys/fs/cgroup");
  return std::min(available, left.value_or(UINT64_MAX));
}

}  // namespace kvrelay
