// kvrelay bench small: one block of 4 KiB, from the call to its completion as the caller sees it.
#include <algorithm>
#include <chrono>
#include <memory>
#include <nlohmann/json.hpp>
#include <thread>
#include <utility>
#include <vector>

#include "tools/common/output.h"
#include "tools/common/start.h"
#include "tools/common/table.h"
#include "tools/kvrelay/bench/agent_pulls.h"
#include "tools/kvrelay/bench/bench.h"
#include "tools/kvrelay/bench/pull_way.h"
#include "tools/kvrelay/bench/spread.h"
#include "transport/curve.h"

namespace kvrelay::tools {
namespace {

using std::chrono::steady_clock;
using Json = nlohmann::ordered_json;

constexpr uint64_t kBlockBytes = 4096;
constexpr uint32_t kConnects = 21;

struct SmallOptions {
  uint32_t count = 20'000;
  uint32_t silences = 10;
  uint32_t silence_ms = 1000;
  uint32_t mib = 512;
  std::string peers;
  bool json = false;
};

// What one way took.
struct WayTimes {
  PullWay* way = nullptr;
  std::vector<double> hot = {};   // us
  std::vector<double> cold = {};  // us
  std::string failure = {};
};

// Blocks by turns, so that none is in a cache because it was just read.
class Blocks {
 public:
  explicit Blocks(uint64_t memory_bytes) {
    const uint64_t most = PullCase::MaxCount(memory_bytes, kBlockBytes);
    const PullCase all =
        PullCase::Make(memory_bytes, kBlockBytes, 0, std::min<uint64_t>(most, 4096));
    for (const CopySegment& slice : all.slices) {
      PullCase one = all;
      one.count = 1;
      one.slices = {slice};
      blocks_.push_back(std::move(one));
    }
  }
  size_t size() const { return blocks_.size(); }
  const PullCase& Next() { return blocks_[next_++ % blocks_.size()]; }

 private:
  std::vector<PullCase> blocks_;
  size_t next_ = 0;
};

// For packed streams the owner makes the case anew from its numbers: always the first block.
const PullCase& BlockFor(const PullWay& way, Blocks& blocks, const PullCase& first) {
  return way.remakes_case() ? first : blocks.Next();
}

Status PullOnce(WayTimes& row, const PullCase& block, std::vector<double>& us) {
  KVRELAY_RETURN_IF_ERROR(row.way->Prepare(block));
  KVRELAY_ASSIGN_OR_RETURN(const double seconds, row.way->Pull(block));
  us.push_back(seconds * 1e6);
  return {};
}

Json MeasureWays(const SmallOptions& options, const PullWays& ways, uint64_t memory_bytes) {
  std::vector<WayTimes> rows;
  for (const auto* list : {&ways.near_ways, &ways.ways}) {
    for (const auto& way : *list) {
      if (way->threads() == 1) rows.push_back({.way = way.get()});
    }
  }
  Blocks blocks(memory_bytes);
  const PullCase first = PullCase::Make(memory_bytes, kBlockBytes, 0, 1);
  // All pages are there before the first is timed.
  std::vector<double> not_counted;
  for (size_t i = 0; i < blocks.size(); ++i) {
    if (!PullOnce(rows.front(), blocks.Next(), not_counted).ok()) break;
  }
  for (WayTimes& row : rows) {
    const TimePoint until = steady_clock::now() + std::chrono::seconds(2);
    for (uint32_t i = 0; i < options.count && steady_clock::now() < until; ++i) {
      if (Status status = PullOnce(row, BlockFor(*row.way, blocks, first), row.hot); !status.ok()) {
        row.failure = status.ToString();
        break;
      }
    }
    WriteErrorLine(row.way->name() + ": " +
                   (row.failure.empty() ? TimesOf(row.hot).dump() : row.failure));
  }
  for (uint32_t i = 0; i < options.silences; ++i) {
    std::this_thread::sleep_for(Millis(options.silence_ms));
    for (WayTimes& row : rows) {
      if (!row.failure.empty()) continue;
      if (Status status = PullOnce(row, BlockFor(*row.way, blocks, first), row.cold);
          !status.ok()) {
        row.failure = status.ToString();
      }
    }
  }
  Json out = Json::array();
  for (const WayTimes& row : rows) {
    Json json = {{"way", row.way->name()}};
    if (row.failure.empty()) {
      json["hot"] = TimesOf(row.hot);
      if (!row.cold.empty()) json["cold"] = TimesOf(row.cold);
    } else {
      json["failure"] = row.failure;
    }
    out.push_back(std::move(json));
  }
  return out;
}

Json MeasureConnects(const PullWays& ways) {
  Json out = Json::array();
  for (const auto& [name, connect] : ways.connects) {
    std::vector<double> ms;
    std::string failure;
    for (uint32_t i = 0; i < kConnects && failure.empty(); ++i) {
      const auto seconds = connect();
      if (seconds.has_value()) {
        ms.push_back(*seconds * 1e3);
      } else {
        failure = seconds.error().ToString();
      }
    }
    Json json = {{"way", name}};
    if (failure.empty()) {
      json["connect_and_read_ms"] = SpreadOf(ms).ToJson();
    } else {
      json["failure"] = failure;
    }
    out.push_back(std::move(json));
  }
  return out;
}

std::string Report(const SmallOptions& options, const Json& json) {
  if (options.json) return json.dump(1) + "\n";
  Table table({"way", ">hot p50 us", ">p99", ">cold p50", ">p99"});
  for (const Json& row : json["rows"]) {
    const auto cell = [&row](const char* when, const char* what) {
      return row.contains(when) ? FormatNumber(row[when][what].get<double>()) : std::string("-");
    };
    table.Row({row["way"].get<std::string>(), cell("hot", "p50_us"), cell("hot", "p99_us"),
               cell("cold", "p50_us"), cell("cold", "p99_us")});
  }
  return table.Text("") + "connect: " + json["connects"].dump() +
         "\nagent: " + json["agent"].dump() + "\n";
}

Result<std::string> Bench(const SmallOptions& options, const std::string& folder) {
  const uint64_t memory_bytes = uint64_t{options.mib} << 20;
  const AgentPulls agents{.loads = std::min<uint32_t>(options.count, 2000),
                          .silences = options.silences,
                          .silence = Millis(options.silence_ms)};
  const auto curve =
      std::make_shared<const transport::CurveIdentity>(transport::NewCurveIdentity());
  KVRELAY_ASSIGN_OR_RETURN(auto sockets, TcpPair());
  KVRELAY_ASSIGN_OR_RETURN(Beside owner, Beside::Start([&](Channel& channel) {
                             return RunOwner(channel, std::move(sockets.second), folder + "/owner",
                                             memory_bytes);
                           }));
  KVRELAY_ASSIGN_OR_RETURN(Beside lender, Beside::Start([&](Channel& channel) {
                             return OfferToAgents(channel, folder, agents, curve);
                           }));
  Json json = {{"schema", 1},
               {"benchmark", "small"},
               {"machine", MachineJson()},
               {"block_bytes", kBlockBytes},
               {"region_bytes", memory_bytes}};
  {
    KVRELAY_ASSIGN_OR_RETURN(const auto side, Side::Create(folder + "/reader", memory_bytes));
    ReaderContext context{*side, owner.channel(), std::move(sockets.first)};
    KVRELAY_ASSIGN_OR_RETURN(PullWays ways, OpenWays(context, owner.pid(), {1}));
    if (!options.peers.empty()) OpenPeerWays(options.peers, folder, memory_bytes, ways);
    json["rows"] = MeasureWays(options, ways, memory_bytes);
    json["connects"] = MeasureConnects(ways);
  }
  KVRELAY_ASSIGN_OR_RETURN(json["agent"], MeasureAgents(lender.channel(), folder, agents, curve));
  return Report(options, json);
}

}  // namespace

int BenchSmallCommand(CommandArgs args) {
  SmallOptions options;
  FlagSet flags("kvrelay bench small [flags]",
                "Pulls one block of 4 KiB again and again, without and with silences between.",
                "kvrelay bench small --silences=0");
  flags.Whole("count", &options.count, 2, 1'000'000, "pulls of each way, at most two seconds");
  flags.Whole("silences", &options.silences, 0, 1000, "pulls of each way after a silence");
  flags.Whole("silence_ms", &options.silence_ms, 1, 60'000, "milliseconds of silence");
  flags.Whole("mib", &options.mib, 1, 4096, "MiB of the owner's memory");
  flags.Text("peers", &options.peers, "FILE", "other systems, as for kvrelay bench pull");
  flags.Switch("json", &options.json, "one object on stdout");
  if (const auto done = ParseOrFinish(flags, args)) return *done;
  return InTemporaryFolder(flags.program(), options.json,
                           [&](const std::string& folder) { return Bench(options, folder); });
}

}  // namespace kvrelay::tools
