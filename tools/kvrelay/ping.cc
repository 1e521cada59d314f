// kvrelay ping: how long a connection and a round trip to a daemon's control thread take.
#include <algorithm>
#include <chrono>
#include <cmath>
#include <nlohmann/json.hpp>
#include <vector>

#include "tools/common/exit_code.h"
#include "tools/common/keys.h"
#include "tools/common/output.h"
#include "tools/common/start.h"
#include "tools/common/stop_signals.h"
#include "tools/common/units.h"
#include "tools/kvrelay/ask.h"
#include "tools/kvrelay/command.h"

namespace kvrelay::tools {
namespace {

using std::chrono::steady_clock;

struct PingOptions {
  std::string endpoint;
  KeyFlags keys;
  uint32_t count = 100;
  bool json = false;
  uint32_t timeout_ms = 2000;
};

struct Times {
  proto::PingReply peer;
  double handshake_ms = 0;     // connecting and the first round trip
  std::vector<double> rtt_ms;  // sorted; of the round trips after it

  double Percentile(double p) const {
    const auto last = static_cast<double>(rtt_ms.size() - 1);
    return rtt_ms[static_cast<size_t>(std::lround(p * last))];
  }
};

Result<Times> Measure(Asker& asker, const PingOptions& options) {
  Times times;
  for (uint32_t i = 0; i <= options.count; ++i) {
    const auto start = steady_clock::now();
    KVRELAY_ASSIGN_OR_RETURN(times.peer,
                             asker.Ask<proto::PingReply>(proto::Type::kPing, proto::Empty{},
                                                         Millis(options.timeout_ms)));
    const double ms = ToMillis(steady_clock::now() - start);
    if (i == 0) {
      times.handshake_ms = ms;
    } else {
      times.rtt_ms.push_back(ms);
    }
  }
  std::sort(times.rtt_ms.begin(), times.rtt_ms.end());
  return times;
}

std::string TimesJson(const Times& times, const std::string& endpoint) {
  const nlohmann::ordered_json json = {{"schema", 1},
                                       {"endpoint", endpoint},
                                       {"engine_id", times.peer.engine.ToHex()},
                                       {"version", times.peer.version},
                                       {"handshake_ms", times.handshake_ms},
                                       {"count", times.rtt_ms.size()},
                                       {"rtt_p50_ms", times.Percentile(0.5)},
                                       {"rtt_p99_ms", times.Percentile(0.99)},
                                       {"rtt_min_ms", times.rtt_ms.front()},
                                       {"rtt_max_ms", times.rtt_ms.back()}};
  return json.dump(-1, ' ', false, nlohmann::json::error_handler_t::replace);
}

std::string TimesText(const Times& times, const std::string& endpoint) {
  return "engine " + times.peer.engine.ToHex() + " (" + times.peer.version + ") at " + endpoint +
         "\nhandshake  " + FormatMillis(times.handshake_ms) + "\nRTT        p50 " +
         FormatMillis(times.Percentile(0.5)) + ", p99 " + FormatMillis(times.Percentile(0.99)) +
         ", min " + FormatMillis(times.rtt_ms.front()) + ", max " +
         FormatMillis(times.rtt_ms.back()) + " over " + FormatCount(times.rtt_ms.size()) +
         " pings\n";
}

}  // namespace

int PingCommand(CommandArgs args) {
  PingOptions options;
  FlagSet flags("kvrelay ping ENDPOINT [flags]",
                "Connects to a daemon and measures round trips to its control thread.",
                "kvrelay ping tcp://127.0.0.1:7601 --count=1000");
  flags.Argument("ENDPOINT", &options.endpoint, "a daemon's front, tcp://HOST:PORT[#KEY]");
  flags.Whole("count", &options.count, 1, 1'000'000, "round trips after the first");
  flags.Switch("json", &options.json, "one object on stdout");
  AddTimeoutFlag(flags, &options.timeout_ms);
  options.keys.Declare(flags);
  if (const auto done = ParseOrFinish(flags, args)) return *done;

  Result<Asker> asker = Asker::Open(options.endpoint, options.keys);
  if (!asker) return FailUsage(flags, asker.error(), options.json);
  const Result<StopSignals> signals = StopSignals::Install(kExitCancelled);
  if (!signals) {
    ReportFailure(flags.program(), signals.error(), "", options.json);
    return kExitFailed;
  }
  const WhenStopped interrupt(*signals, [&asker] { asker->client().Interrupt(); });
  const Result<Times> times = Measure(*asker, options);
  if (!times) {
    ReportFailure(flags.program(), times.error(), asker->endpoint(), options.json);
    return ExitCodeOf(times.error().code());
  }
  WriteOut(options.json ? TimesJson(*times, asker->endpoint()) + "\n"
                        : TimesText(*times, asker->endpoint()));
  return kExitOk;
}

}  // namespace kvrelay::tools
