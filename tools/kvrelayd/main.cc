// kvrelayd: a prefill or decode daemon.
#include <glog/logging.h>

#include "tools/common/exit_code.h"
#include "tools/common/logging.h"
#include "tools/common/output.h"
#include "tools/common/start.h"
#include "tools/common/stop_signals.h"
#include "tools/kvrelayd/daemon.h"
#include "tools/kvrelayd/options.h"

namespace kvrelay::tools {
namespace {

int Main(const std::vector<std::string>& args) {
  DaemonOptions options;
  FlagSet flags(
      "kvrelayd --role=prefill --model=DIR [flags]\n"
      "       kvrelayd --role=decode --model=DIR --prefill=ENDPOINT,... [flags]",
      "Serves one engine. When it takes requests it writes one line of JSON to stdout; logs go to "
      "stderr.\n"
      "The first SIGTERM or SIGINT drains and ends it (exit status 0), the second ends it at once "
      "(1).",
      "kvrelayd --role=prefill --model=models/bard-4m --tp=2 --listen=tcp://127.0.0.1:7601");
  options.Declare(flags);
  if (const auto done = ParseOrFinish(flags, args)) return *done;
  if (const Status status = options.Check(); !status.ok()) return FailUsage(flags, status, false);
  StartLogging("kvrelayd", options.log_level);

  const Result<StopSignals> signals = StopSignals::Install(kExitFailed);
  if (!signals) {
    ReportFailure("kvrelayd", signals.error(), "", false);
    return kExitFailed;
  }
  const Result<std::unique_ptr<Daemon>> daemon = Daemon::Start(options, flags.Effective());
  if (!daemon) {
    ReportFailure("kvrelayd", daemon.error(), "", false);
    return SetupExitCodeOf(daemon.error().code());
  }
  WriteOut((*daemon)->ReadyLine() + "\n");
  const size_t cut = (*daemon)->Serve(*signals, Millis(options.drain_timeout_ms));
  LOG(INFO) << "stopped; " << cut << " requests and leases were cut off";
  return kExitOk;
}

}  // namespace
}  // namespace kvrelay::tools

int main(int argc, char** argv) {
  kvrelay::tools::PrepareStandardStreams();
  return kvrelay::tools::Main(kvrelay::tools::Arguments(argc, argv));
}
