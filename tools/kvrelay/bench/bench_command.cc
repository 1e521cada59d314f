// kvrelay bench: which one.
#include <algorithm>
#include <array>
#include <string>
#include <string_view>
#include <vector>

#include "tools/common/exit_code.h"
#include "tools/common/flag_text.h"
#include "tools/common/flags.h"
#include "tools/common/output.h"
#include "tools/kvrelay/bench/bench.h"

namespace kvrelay::tools {
namespace {

struct Benchmark {
  std::string_view name;
  std::string_view summary;
  int (*run)(CommandArgs args);
};

constexpr std::array<Benchmark, 3> kBenchmarks = {{
    {"pull", "pulls between two processes on this host, every way interleaved", BenchPullCommand},
    {"small", "how long a pull of one block of 4 KiB takes, and connecting", BenchSmallCommand},
    {"control", "many owners, many leases, many pulls at once", BenchControlCommand},
}};

std::string BenchOverview() {
  std::string text =
      "Usage: kvrelay bench NAME [flags]\n\nMeasures this build on this machine.\n\n";
  for (const Benchmark& bench : kBenchmarks) text += HelpEntry(bench.name, bench.summary, 14);
  return text + "\nkvrelay bench NAME --help shows its flags.\n\nExample:\n  kvrelay bench pull\n";
}

}  // namespace

int BenchCommand(CommandArgs args) {
  const std::string name = args.empty() ? "" : args.front();
  if (name == "--help" || name == "-h") {
    WriteOut(BenchOverview());
    return kExitOk;
  }
  const auto* const bench = std::ranges::find(kBenchmarks, name, &Benchmark::name);
  if (bench != kBenchmarks.end()) return bench->run(args.subspan(1));
  std::vector<std::string> names;
  names.reserve(kBenchmarks.size());
  for (const Benchmark& b : kBenchmarks) names.emplace_back(b.name);
  ReportFailure(
      "kvrelay bench",
      {Code::kInvalidArgument, "no benchmark '" + name + "': there are " + Join(names, ", ")}, "",
      AsksForJson(args));
  return kExitUsage;
}

}  // namespace kvrelay::tools
