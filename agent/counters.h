// Named totals, as `inspect` and later Prometheus show them:
// "kvrelay_pulls_total{path=\"mapped\",outcome=\"ok\"}".
#pragma once

#include <map>
#include <mutex>
#include <string>

namespace kvrelay::agent {

// Any thread.
class Counters {
 public:
  void Add(const std::string& name, double amount = 1);
  double Get(const std::string& name) const;
  std::map<std::string, double> Snapshot() const;

 private:
  mutable std::mutex mutex_;
  std::map<std::string, double> values_;
};

}  // namespace kvrelay::agent
