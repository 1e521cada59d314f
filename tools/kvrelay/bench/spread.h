// What repeated measurements say.
#pragma once

#include <nlohmann/json_fwd.hpp>
#include <string>
#include <vector>

namespace kvrelay::tools {

struct Spread {
  double min = 0;
  double median = 0;
  double max = 0;

  nlohmann::ordered_json ToJson() const;
  std::string ToText() const;  // "1.20 / 1.31 / 1.35"
};
// Of at least one value.
Spread SpreadOf(std::vector<double> values);
// The value below which `part` of them lie.
double Percentile(std::vector<double> values, double part);

// p50, p99 and min of at least one time in microseconds, and how many there are.
nlohmann::ordered_json TimesOf(const std::vector<double>& us);

// Three digits that matter: "0.0123", "1.23", "123".
std::string FormatNumber(double value);

}  // namespace kvrelay::tools
