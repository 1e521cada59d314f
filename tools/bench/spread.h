// What many measurements of one thing were.
#pragma once

#include <algorithm>
#include <nlohmann/json.hpp>
#include <vector>

namespace kvrelay::bench {

struct Spread {
  // At least one value.
  explicit Spread(std::vector<double> values) {
    std::ranges::sort(values);
    min = values.front();
    median = values[values.size() / 2];
    max = values.back();
  }
  nlohmann::ordered_json json() const { return {{"min", min}, {"median", median}, {"max", max}}; }
  nlohmann::ordered_json json_us() const {
    return {{"min_us", min}, {"median_us", median}, {"max_us", max}};
  }

  double min = 0;
  double median = 0;
  double max = 0;
};

}  // namespace kvrelay::bench
