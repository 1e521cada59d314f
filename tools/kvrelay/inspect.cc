// kvrelay inspect: what a daemon holds and does, as tables or as its own JSON.
#include <chrono>

#include "tools/common/describe.h"
#include "tools/common/describe_text.h"
#include "tools/common/exit_code.h"
#include "tools/common/keys.h"
#include "tools/common/output.h"
#include "tools/common/start.h"
#include "tools/common/stop_signals.h"
#include "tools/kvrelay/ask.h"
#include "tools/kvrelay/command.h"

namespace kvrelay::tools {
namespace {

constexpr Duration kRefresh = std::chrono::seconds(1);

struct InspectOptions {
  std::string endpoint;
  KeyFlags keys;
  bool json = false;
  bool watch = false;
  uint32_t timeout_ms = 2000;
};

// What to print for one look.
Result<std::string> Look(Asker& asker, const InspectOptions& options) {
  KVRELAY_ASSIGN_OR_RETURN(
      const auto reply, asker.Ask<proto::DescribeReply>(proto::Type::kDescribe, proto::Describe{},
                                                        Millis(options.timeout_ms)));
  if (options.json) return reply.json + "\n";
  KVRELAY_ASSIGN_OR_RETURN(const Description description, DescriptionFromJson(reply.json));
  return DescriptionText(description, StdoutIsTerminal());
}

}  // namespace

int InspectCommand(CommandArgs args) {
  InspectOptions options;
  FlagSet flags("kvrelay inspect ENDPOINT [flags]",
                "Shows a daemon's cache, regions, leases, pulls, peers and the paths to them, "
                "prefixes, counters\n"
                "and effective flags.",
                "kvrelay inspect tcp://127.0.0.1:7601 --watch");
  flags.Argument("ENDPOINT", &options.endpoint, "a daemon's front, tcp://HOST:PORT[#KEY]");
  flags.Switch("json", &options.json,
               "the daemon's own description as JSON; with --watch one object a line");
  flags.Switch("watch", &options.watch, "looks again every second until ^C");
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
  const bool redraw = options.watch && !options.json && StdoutIsTerminal();
  for (;;) {
    const Result<std::string> page = Look(*asker, options);
    if (!page) {
      ReportFailure(flags.program(), page.error(), asker->endpoint(), options.json);
      return ExitCodeOf(page.error().code());
    }
    // Home, then clear what an earlier, longer page left below.
    WriteOut(redraw ? "\033[H\033[J" + *page : *page);
    if (!options.watch) return kExitOk;
    if (signals->Wait(kRefresh)) return kExitCancelled;
  }
}

}  // namespace kvrelay::tools
