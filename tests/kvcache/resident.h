// What /proc says about this process's memory.
#pragma once

#include <cstdint>
#include <fstream>
#include <sstream>
#include <string>

namespace kvrelay::testing_support {

struct Resident {
  uint32_t mappings = 0;
  uint64_t bytes = 0;  // in this process's page tables
};

// Of the memfd `name`.
inline Resident ResidentOf(const std::string& name) {
  Resident resident;
  std::ifstream file("/proc/self/smaps");
  bool ours = false;
  for (std::string line; std::getline(file, line);) {
    std::istringstream words(line);
    std::string first;
    uint64_t kib = 0;
    words >> first;
    if (first.back() != ':') {
      ours = line.find("memfd:" + name + " ") != std::string::npos;
      if (ours) ++resident.mappings;
    } else if (ours && first == "Rss:" && words >> kib) {
      resident.bytes += kib * 1024;
    }
  }
  return resident;
}

}  // namespace kvrelay::testing_support
