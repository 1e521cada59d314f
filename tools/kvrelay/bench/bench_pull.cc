// kvrelay bench pull: pulls between two processes on this host, every way interleaved.

#include <algorithm>
#include <map>
#include <nlohmann/json.hpp>
#include <string_view>
#include <vector>

#include "base/cpu.h"
#include "base/parallel.h"
#include "tools/common/exit_code.h"
#include "tools/common/output.h"
#include "tools/common/start.h"
#include "tools/common/table.h"
#include "tools/common/version.h"
#include "tools/kvrelay/bench/bench.h"
#include "tools/kvrelay/bench/layout_pulls.h"
#include "tools/kvrelay/bench/pull_way.h"
#include "tools/kvrelay/bench/spread.h"

namespace kvrelay::tools {
namespace {

using Json = nlohmann::ordered_json;

struct PullOptions {
  std::vector<uint32_t> slices = {256, 1024, 2048, 4096, 16384, 65536, 262144, 1 << 20};
  std::vector<uint32_t> threads = {};
  uint32_t mib = 64;
  uint32_t rounds = 7;
  std::string ways;
  std::string peers;
  bool json = false;

  uint64_t memory_bytes() const { return uint64_t{mib} * PullCase::kSets << 20; }
};

// A pull that would take longer than this moves fewer bytes.
constexpr double kPullSeconds = 0.1;

// What one way's pulls of one slice size gave.
struct Row {
  PullWay* way = nullptr;
  std::vector<PullCase> cases = {};  // by set
  std::vector<double> rates = {};    // GB/s
  std::string failure = {};
};

// Whether `name` stands in a comma-separated list.
bool IsNamed(std::string_view name, std::string_view names) {
  while (true) {
    const size_t comma = names.find(',');
    if (names.substr(0, comma) == name) return true;
    if (comma == std::string_view::npos) return false;
    names.remove_prefix(comma + 1);
  }
}

std::string NameOf(const PullWay& way) { return way.name() + " x" + std::to_string(way.threads()); }

class PullBench {
 public:
  PullBench(const PullOptions& options, PullWays ways, Side& side)
      : options_(options), ways_(std::move(ways)), side_(side) {}

  void Run() {
    for (const uint32_t slice : options_.slices) MeasureSlices(slice);
    if (ways_.read_plans) MeasureLayouts();
  }
  // Everything that was there, for stdout.
  std::string Report() const;

 private:
  // The pull as this way can do it in bounded time, verified once.
  Status Calibrate(Row& row, uint64_t slice) const;
  Status Verify(Row& row) const;
  Status PullOnce(Row& row, int round) const;
  void MeasureSlices(uint64_t slice);
  void MeasureLayouts();
  Status VerifyLayout(const LayoutPull& pull) const;

  const PullOptions& options_;
  const PullWays ways_;
  Side& side_;
  Json rows_ = Json::array();
  Json layouts_ = Json::array();
};

Status PullBench::Calibrate(Row& row, uint64_t slice) const {
  const uint64_t most = PullCase::MaxCount(options_.memory_bytes(), slice);
  uint64_t count = std::clamp<uint64_t>((uint64_t{1} << 20) / slice, 1, most);
  const PullCase probe = PullCase::Make(options_.memory_bytes(), slice, 0, count);
  KVRELAY_RETURN_IF_ERROR(row.way->Prepare(probe));
  KVRELAY_ASSIGN_OR_RETURN(const double seconds, row.way->Pull(probe));
  const double fit = static_cast<double>(count) * kPullSeconds / std::max(seconds, 1e-9);
  count =
      fit > static_cast<double>(most) ? most : std::max<uint64_t>(1, static_cast<uint64_t>(fit));
  for (uint32_t set = 0; set < PullCase::kSets; ++set) {
    row.cases.push_back(PullCase::Make(options_.memory_bytes(), slice, set, count));
  }
  return Verify(row);
}

Status PullBench::Verify(Row& row) const {
  for (const PullCase& pull : row.cases) {
    KVRELAY_RETURN_IF_ERROR(row.way->Prepare(pull));
    KVRELAY_RETURN_IF_ERROR(row.way->Erase(pull));
    KVRELAY_ASSIGN_OR_RETURN([[maybe_unused]] const double seconds, row.way->Pull(pull));
    if (!row.way->copies_bytes()) continue;
    KVRELAY_ASSIGN_OR_RETURN(const bool holds, row.way->Holds(pull));
    if (!holds) return {Code::kInternal, "the bytes are not the owner's"};
  }
  return {};
}

Status PullBench::PullOnce(Row& row, int round) const {
  const PullCase& pull = row.cases[static_cast<size_t>(round) % row.cases.size()];
  KVRELAY_RETURN_IF_ERROR(row.way->Prepare(pull));
  KVRELAY_ASSIGN_OR_RETURN(const double seconds, row.way->Pull(pull));
  row.rates.push_back(static_cast<double>(pull.bytes()) / seconds / 1e9);
  return {};
}

void PullBench::MeasureSlices(uint64_t slice) {
  std::vector<Row> rows;
  for (const auto& way : ways_.ways) rows.push_back({.way = way.get()});
  const auto note = [](Row& row, const Status& status) { row.failure = status.ToString(); };
  for (Row& row : rows) {
    if (Status status = Calibrate(row, slice); !status.ok()) note(row, status);
  }
  for (uint32_t round = 0; round < options_.rounds; ++round) {
    for (size_t i = 0; i < rows.size(); ++i) {
      Row& row = rows[(i + round) % rows.size()];
      if (!row.failure.empty()) continue;
      if (Status status = PullOnce(row, static_cast<int>(round)); !status.ok()) note(row, status);
    }
  }
  for (const Row& row : rows) {
    Json json = {{"slice_bytes", slice},
                 {"way", row.way->name()},
                 {"threads", row.way->threads()},
                 {"verified", row.failure.empty() && row.way->copies_bytes()}};
    if (row.failure.empty()) {
      json["bytes"] = row.cases.front().bytes();
      json["gb_per_s"] = SpreadOf(row.rates).ToJson();
    } else {
      json["failure"] = row.failure;
    }
    WriteErrorLine(std::to_string(slice) + " B, " + NameOf(*row.way) + ": " +
                   (row.failure.empty() ? SpreadOf(row.rates).ToText() + " GB/s" : row.failure));
    rows_.push_back(std::move(json));
  }
}

Status PullBench::VerifyLayout(const LayoutPull& pull) const {
  std::ranges::fill(side_.memory(), std::byte{});
  KVRELAY_ASSIGN_OR_RETURN([[maybe_unused]] const double seconds, ways_.read_plans(pull.plans));
  if (HoldsLayoutPull(pull, options_.memory_bytes(), side_.memory())) return {};
  return {Code::kInternal, "the bytes are not the owner's"};
}

void PullBench::MeasureLayouts() {
  const auto pulls = MakeLayoutPulls(options_.memory_bytes());
  if (!pulls.has_value()) return WriteErrorLine(pulls.error().ToString());
  for (const uint32_t threads : options_.threads) {
    SetParallelism(static_cast<int>(threads));
    std::vector<Status> failures;
    for (const LayoutPull& pull : *pulls) failures.push_back(VerifyLayout(pull));
    std::vector<std::vector<double>> rates(pulls->size());
    std::vector<std::vector<double>> costs(pulls->size());  // of the same round's first
    for (uint32_t round = 0; round < options_.rounds; ++round) {
      double plain = 0;
      for (size_t i = 0; i < pulls->size(); ++i) {
        if (!failures[i].ok()) continue;
        const auto seconds = ways_.read_plans((*pulls)[i].plans);
        if (!seconds.has_value()) {
          failures[i] = seconds.error();
          continue;
        }
        if (i == 0) plain = *seconds;
        rates[i].push_back(static_cast<double>((*pulls)[i].read_bytes) / *seconds / 1e9);
        costs[i].push_back(*seconds / plain);
      }
    }
    for (size_t i = 0; i < pulls->size(); ++i) {
      const LayoutPull& pull = (*pulls)[i];
      Json json = {{"pull", pull.name},
                   {"threads", threads},
                   {"verified", failures[i].ok()},
                   {"read_bytes", pull.read_bytes},
                   {"slices", pull.slices}};
      if (failures[i].ok()) {
        json["gb_per_s"] = SpreadOf(rates[i]).ToJson();
        json["cost"] = SpreadOf(costs[i]).ToJson();
      } else {
        json["failure"] = failures[i].ToString();
      }
      WriteErrorLine(pull.name + " x" + std::to_string(threads) + ": " +
                     (failures[i].ok() ? SpreadOf(rates[i]).ToText() + " GB/s, cost " +
                                             SpreadOf(costs[i]).ToText()
                                       : failures[i].ToString()));
      layouts_.push_back(std::move(json));
    }
  }
}

// Seconds a byte at the smallest slices, less those at the largest, for each slice: what a slice
// costs besides its bytes.
Json NanosecondsPerSlice(const Json& rows) {
  struct Ends {
    const Json* smallest = nullptr;
    const Json* largest = nullptr;
  };
  std::map<std::string, Ends> ends;
  for (const Json& row : rows) {
    if (!row.contains("gb_per_s")) continue;
    Ends& e =
        ends[row["way"].get<std::string>() + " x" + std::to_string(row["threads"].get<int>())];
    const auto slice = row["slice_bytes"].get<uint64_t>();
    if (!e.smallest || slice < (*e.smallest)["slice_bytes"].get<uint64_t>()) e.smallest = &row;
    if (!e.largest || slice > (*e.largest)["slice_bytes"].get<uint64_t>()) e.largest = &row;
  }
  Json out = Json::object();
  for (const auto& [name, e] : ends) {
    const auto ns_per_byte = [](const Json& row) {
      return 1 / row["gb_per_s"]["median"].get<double>();
    };
    if (e.smallest == e.largest) continue;
    out[name] = (ns_per_byte(*e.smallest) - ns_per_byte(*e.largest)) *
                (*e.smallest)["slice_bytes"].get<double>();
  }
  return out;
}

std::string PullBench::Report() const {
  Json refused = Json::array();
  for (const auto& [name, why] : ways_.refused) refused.push_back({{"way", name}, {"why", why}});
  const Json json = {{"schema", 1},
                     {"benchmark", "pull"},
                     {"machine", MachineJson()},
                     {"rounds", options_.rounds},
                     {"pull_bytes", uint64_t{options_.mib} << 20},
                     {"rows", rows_},
                     {"ns_per_slice", NanosecondsPerSlice(rows_)},
                     {"layouts", layouts_},
                     {"refused", refused}};
  if (options_.json) return json.dump(1) + "\n";
  Table table({">slice", "way", ">threads", ">min", ">median", ">max", "GB/s"});
  const auto number = [](const Json& value) { return FormatNumber(value.get<double>()); };
  const auto add = [&](const std::string& slice, const Json& row, const std::string& name) {
    const bool ok = row.contains("gb_per_s");
    const Json rate = ok ? row["gb_per_s"] : Json();
    table.Row({slice, name, std::to_string(row["threads"].get<int>()),
               ok ? number(rate["min"]) : "-", ok ? number(rate["median"]) : "-",
               ok ? number(rate["max"]) : "-",
               ok ? (row.contains("cost") ? "cost " + number(row["cost"]["median"]) : "")
                  : row["failure"].get<std::string>()});
  };
  for (const Json& row : rows_) {
    add(std::to_string(row["slice_bytes"].get<uint64_t>()), row, row["way"].get<std::string>());
  }
  for (const Json& row : layouts_) add("", row, row["pull"].get<std::string>());
  std::string text = table.Text("");
  for (const auto& [name, why] : ways_.refused) text += "no " + name + ": " + why + "\n";
  return text;
}

Result<std::string> Bench(const PullOptions& options, const std::string& folder) {
  KVRELAY_ASSIGN_OR_RETURN(auto sockets, TcpPair());
  KVRELAY_ASSIGN_OR_RETURN(Beside owner, Beside::Start([&](Channel& channel) {
                             return RunOwner(channel, std::move(sockets.second), folder + "/owner",
                                             options.memory_bytes());
                           }));
  KVRELAY_ASSIGN_OR_RETURN(const auto side,
                           Side::Create(folder + "/reader", options.memory_bytes()));
  ReaderContext context{*side, owner.channel(), std::move(sockets.first)};
  const std::vector<int> threads(options.threads.begin(), options.threads.end());
  KVRELAY_ASSIGN_OR_RETURN(PullWays ways, OpenWays(context, owner.pid(), threads));
  if (!options.peers.empty()) {
    OpenPeerWays(options.peers, folder, options.memory_bytes(), ways);
  }
  if (!options.ways.empty()) {
    std::erase_if(ways.ways, [&](const auto& way) { return !IsNamed(way->name(), options.ways); });
    if (ways.ways.empty()) return Error(Code::kInvalidArgument, "no way is named " + options.ways);
    ways.read_plans = nullptr;
  }
  PullBench bench(options, std::move(ways), *side);
  bench.Run();
  return bench.Report();
}

}  // namespace

int BenchPullCommand(CommandArgs args) {
  PullOptions options;
  options.threads = {1};
  if (const auto all = static_cast<uint32_t>(AvailableThreads()); all > 1) {
    options.threads.push_back(all);
  }
  FlagSet flags("kvrelay bench pull [flags]",
                "Pulls scattered slices from another process by every way there is.",
                "kvrelay bench pull --slices=4096,65536 --json");
  flags.Ids("slices", &options.slices, "bytes a slice; powers of two from 64 to 1 MiB");
  flags.Ids("threads", &options.threads, "numbers of threads of the reader");
  flags.Whole("mib", &options.mib, 1, 1024, "MiB a pull; ways too slow for it move less");
  flags.Whole("rounds", &options.rounds, 1, 1000, "pulls of each way, taken in turn");
  flags.Text("ways", &options.ways, "NAMES",
             "only these, comma-separated, and no pairs of layouts; empty: all");
  flags.Text("peers", &options.peers, "FILE",
             "other systems to compare with, a name and a command "
             "each line (see scripts/bench-host)");
  flags.Switch("json", &options.json, "one object on stdout");
  if (const auto done = ParseOrFinish(flags, args)) return *done;
  const bool sizes_ok = std::ranges::all_of(options.slices, [&](uint32_t slice) {
    return slice >= 64 && slice <= (1 << 20) && (slice & (slice - 1)) == 0;
  });
  const bool threads_ok = std::ranges::all_of(
      options.threads, [](uint32_t count) { return count >= 1 && count <= 1024; });
  if (!sizes_ok || !threads_ok || options.slices.empty() || options.threads.empty()) {
    return FailUsage(flags,
                     {Code::kInvalidArgument,
                      "--slices needs powers of two from 64 to 1048576, --threads numbers from 1 "
                      "to 1024"},
                     options.json);
  }
  return InTemporaryFolder(flags.program(), options.json,
                           [&](const std::string& folder) { return Bench(options, folder); });
}

}  // namespace kvrelay::tools
