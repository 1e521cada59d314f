// How a benchmark program begins and ends: its flags, and its figures in a file.
#pragma once

#include <fstream>
#include <iostream>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "tools/bench/must.h"
#include "tools/common/flags.h"

namespace kvrelay::bench {

// False: it was asked for help, which is printed. Ends the program for flags that are wrong.
inline bool ParseFlags(tools::FlagSet& flags, int argc, char** argv) {
  const std::vector<std::string> arguments(argv + 1, argv + argc);
  const auto action = flags.Parse(arguments, tools::ProcessEnvironment());
  Check(action.has_value(), action.has_value() ? "" : action.error().message());
  if (*action == tools::Action::kRun) return true;
  std::cout << flags.Help();
  return false;
}

// Nothing when `file` is empty.
inline void WriteReport(const nlohmann::ordered_json& report, const std::string& file) {
  if (file.empty()) return;
  std::ofstream out(file);
  out << report.dump(2) << "\n";
  Check(out.flush().good(), "cannot write " + file);
}

}  // namespace kvrelay::bench
