#include "tools/kvrelay/bench/bench.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "base/build_info.h"
#include "base/cpu.h"
#include "tools/common/exit_code.h"
#include "tools/common/output.h"
#include "tools/kvrelay/bench/spread.h"
#include "transport/ucx_version.h"

namespace kvrelay::tools {
namespace {

std::string ProcessorName() {
  std::ifstream file("/proc/cpuinfo");
  for (std::string line; std::getline(file, line);) {
    if (line.starts_with("model name")) return line.substr(line.find(':') + 2);
  }
  return "unknown";
}

}  // namespace

nlohmann::ordered_json MachineJson() {
  double load = -1;
  ::getloadavg(&load, 1);
  return {{"processor", ProcessorName()},
          {"threads", AvailableThreads()},
          {"avx512", HasAvx512()},
          {"load", load},
          {"version", GetBuildInfo().version},
          {"build_type", GetBuildInfo().build_type},
          {"ucx", transport::UcxVersion()}};
}

int InTemporaryFolder(std::string_view program, bool json,
                      const std::function<Result<std::string>(const std::string& folder)>& bench) {
  std::string folder = (std::filesystem::temp_directory_path() / "kvrelay-bench-XXXXXX").string();
  if (::mkdtemp(folder.data()) == nullptr) {
    ReportFailure(program, {Code::kResourceExhausted, "no folder " + folder}, "", json);
    return kExitFailed;
  }
  const Result<std::string> report = bench(folder);
  std::error_code ignored;
  std::filesystem::remove_all(folder, ignored);
  if (!report.has_value()) {
    ReportFailure(program, report.error(), "", json);
    return ExitCodeOf(report.error().code());
  }
  WriteOut(*report);
  return kExitOk;
}

Spread SpreadOf(std::vector<double> values) {
  std::ranges::sort(values);
  return {values.front(), values[values.size() / 2], values.back()};
}

double Percentile(std::vector<double> values, double part) {
  std::ranges::sort(values);
  return values[static_cast<size_t>(std::lround(part * static_cast<double>(values.size() - 1)))];
}

nlohmann::ordered_json Spread::ToJson() const {
  return {{"min", min}, {"median", median}, {"max", max}};
}

std::string Spread::ToText() const {
  return FormatNumber(min) + " / " + FormatNumber(median) + " / " + FormatNumber(max);
}

nlohmann::ordered_json TimesOf(const std::vector<double>& us) {
  return {{"p50_us", Percentile(us, 0.5)},
          {"p99_us", Percentile(us, 0.99)},
          {"min_us", Percentile(us, 0)},
          {"count", us.size()}};
}

std::string FormatNumber(double value) {
  const int digits =
      value == 0 ? 0 : std::max(0, 2 - static_cast<int>(std::floor(std::log10(std::abs(value)))));
  std::array<char, 64> text;
  std::snprintf(text.data(), text.size(), "%.*f", std::min(digits, 9), value);
  return text.data();
}

}  // namespace kvrelay::tools
