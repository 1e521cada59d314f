// kvrelay health: by its exit status, whether a daemon takes requests.
#include <nlohmann/json.hpp>

#include "agent/client.h"
#include "proto/codec.h"
#include "tools/common/endpoint.h"
#include "tools/common/exit_code.h"
#include "tools/common/keys.h"
#include "tools/common/output.h"
#include "tools/common/start.h"
#include "tools/kvrelay/ask.h"
#include "tools/kvrelay/command.h"

namespace kvrelay::tools {
namespace {

struct HealthOptions {
  std::string endpoint;
  KeyFlags keys;
  bool live = false;
  bool json = false;
  uint32_t timeout_ms = 2000;
};

std::string HealthJson(const proto::HealthReply& reply) {
  const nlohmann::ordered_json json = {{"schema", 1},
                                       {"ready", reply.ready},
                                       {"draining", reply.draining},
                                       {"role", reply.role},
                                       {"reason", reply.reason}};
  return json.dump(-1, ' ', false, nlohmann::ordered_json::error_handler_t::replace);
}

}  // namespace

int HealthCommand(CommandArgs args) {
  HealthOptions options;
  FlagSet flags("kvrelay health ENDPOINT [flags]",
                "Asks a daemon whether it takes requests. Exit status: 0 ready (with --live: its "
                "control thread\n"
                "answers), 5 draining or without a usable prefill daemon, 3 no answer.",
                "kvrelay health tcp://127.0.0.1:7601");
  flags.Argument("ENDPOINT", &options.endpoint, "a daemon's front, tcp://HOST:PORT[#KEY]");
  flags.Switch("live", &options.live, "any answer will do");
  flags.Switch("json", &options.json, "one object on stdout");
  AddTimeoutFlag(flags, &options.timeout_ms);
  options.keys.Declare(flags);
  if (const auto done = ParseOrFinish(flags, args)) return *done;

  Result<Asker> asker = Asker::Open(options.endpoint, options.keys);
  if (!asker) return FailUsage(flags, asker.error(), options.json);
  const auto reply = asker->Ask<proto::HealthReply>(proto::Type::kHealth, proto::Empty{},
                                                    Millis(options.timeout_ms));
  if (!reply) {
    ReportFailure(flags.program(), reply.error(), asker->endpoint(), options.json);
    return ExitCodeOf(reply.error().code());
  }
  const std::string state = reply->draining ? "draining" : reply->ready ? "ready" : "not ready";
  WriteOut(options.json ? HealthJson(*reply) + "\n"
                        : reply->role + " " + asker->endpoint() + ": " + state +
                              (reply->reason.empty() ? "" : " (" + reply->reason + ")") + "\n");
  return options.live || reply->ready ? kExitOk : kExitBusy;
}

}  // namespace kvrelay::tools
