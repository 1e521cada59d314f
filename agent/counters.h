// Named totals, as `inspect` and later Prometheus show them:
// "kvrelay_pulls_total{path=\"mapped\",outcome=\"ok\"}".
#pragma once

#include <cstdint>
#include <map>
#include <mutex>
#include <string>

namespace kvrelay::agent {

// Any thread.
class Counters {
 public:
  void Add(const std::string& name, uint64_t n = 1);
  uint64_t Get(const std::string& name) const;
  std::map<std::string, uint64_t> Snapshot() const;

 private:
  mutable std::mutex mutex_;
  std::map<std::string, uint64_t> values_;
};

}  // namespace kvrelay::agent
