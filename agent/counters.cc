#include "agent/counters.h"

namespace kvrelay::agent {

void Counters::Add(const std::string& name, double amount) {
  const std::lock_guard lock(mutex_);
  values_[name] += amount;
}

double Counters::Get(const std::string& name) const {
  const std::lock_guard lock(mutex_);
  const auto it = values_.find(name);
  return it == values_.end() ? 0 : it->second;
}

std::map<std::string, double> Counters::Snapshot() const {
  const std::lock_guard lock(mutex_);
  return values_;
}

}  // namespace kvrelay::agent
