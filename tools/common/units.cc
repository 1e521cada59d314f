#include "tools/common/units.h"

#include <algorithm>
#include <array>
#include <charconv>
#include <cmath>
#include <cstdio>
#include <utility>

#include "tools/common/flag_text.h"

namespace kvrelay::tools {
namespace {

// Three significant digits, without zeros at the end.
std::string Short(double value) {
  const int digits = value >= 100 ? 0 : value >= 10 ? 1 : 2;
  std::array<char, 32> buffer;
  std::snprintf(buffer.data(), buffer.size(), "%.*f", digits, value);
  std::string text = buffer.data();
  if (text.find('.') != std::string::npos) {
    text.erase(text.find_last_not_of('0') + 1);
    if (text.back() == '.') text.pop_back();
  }
  return text;
}

constexpr std::array<std::pair<std::string_view, double>, 10> kUnits = {{{"B", 1},
                                                                         {"KiB", 1024.0},
                                                                         {"MiB", 1048576.0},
                                                                         {"GiB", 1073741824.0},
                                                                         {"TiB", 1099511627776.0},
                                                                         {"kB", 1e3},
                                                                         {"KB", 1e3},
                                                                         {"MB", 1e6},
                                                                         {"GB", 1e9},
                                                                         {"TB", 1e12}}};
constexpr double kMostBytes = 1e15;

}  // namespace

std::string FormatBytes(uint64_t bytes) {
  constexpr std::array<std::string_view, 5> kNames = {" B", " KiB", " MiB", " GiB", " TiB"};
  auto value = static_cast<double>(bytes);
  size_t unit = 0;
  while (value >= 1024 && unit + 1 < kNames.size()) {
    value /= 1024;
    ++unit;
  }
  return Short(value) + std::string(kNames[unit]);
}

std::string FormatMillis(double ms) {
  if (ms < 1) return Short(ms * 1000) + " us";
  if (ms < 1000) return Short(ms) + " ms";
  if (ms < 60'000) return Short(ms / 1000) + " s";
  const auto seconds = static_cast<uint64_t>(ms / 1000);
  if (seconds < 3600) {
    return std::to_string(seconds / 60) + " min " + std::to_string(seconds % 60) + " s";
  }
  return std::to_string(seconds / 3600) + " h " + std::to_string(seconds / 60 % 60) + " min";
}

std::string FormatCount(uint64_t count) {
  std::string text = std::to_string(count);
  for (size_t at = text.size(); at > 3; at -= 3) text.insert(at - 3, ",");
  return text;
}

Result<uint64_t> ParseBytes(std::string_view text) {
  double value = 0;
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), value);
  const std::string_view unit(end, static_cast<size_t>(text.data() + text.size() - end));
  const auto* const known =
      std::find_if(kUnits.begin(), kUnits.end(), [unit](const auto& u) { return u.first == unit; });
  if (text.empty() || error != std::errc() || (known == kUnits.end() && !unit.empty())) {
    return Error(Code::kInvalidArgument, "needs a byte size like 512MiB");
  }
  const double bytes = value * (unit.empty() ? 1 : known->second);
  if (!(bytes >= 0) || bytes > kMostBytes) {
    return Error(Code::kInvalidArgument, "needs a byte size between 0 and 1000TB");
  }
  return static_cast<uint64_t>(bytes);
}

Result<BlockBudget> ParseBlockBudget(std::string_view text) {
  BlockBudget budget;
  if (const std::optional<uint64_t> blocks = ParseWhole(text)) {
    budget.blocks = *blocks;
  } else {
    const Result<uint64_t> bytes = ParseBytes(text);
    if (bytes) budget.bytes = *bytes;
  }
  if (budget.blocks > UINT32_MAX || (budget.blocks == 0 && budget.bytes == 0)) {
    return Error(Code::kInvalidArgument,
                 "needs a number of blocks like 1024, or a byte size like 512MiB");
  }
  return budget;
}

}  // namespace kvrelay::tools
