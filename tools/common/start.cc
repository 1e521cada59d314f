#include "tools/common/start.h"

#include "tools/common/exit_code.h"
#include "tools/common/output.h"
#include "tools/common/version.h"

namespace kvrelay::tools {

std::vector<std::string> Arguments(int argc, char** argv) { return {argv + 1, argv + argc}; }

int FailUsage(const FlagSet& flags, const Status& status, bool json) {
  ReportFailure(flags.program(), status, "", json);
  if (!json) WriteErrorLine("try: " + flags.program() + " --help");
  return kExitUsage;
}

std::optional<int> ParseOrFinish(FlagSet& flags, std::span<const std::string> args) {
  const Result<Action> action = flags.Parse(args, ProcessEnvironment());
  if (!action) return FailUsage(flags, action.error(), AsksForJson(args));
  switch (*action) {
    case Action::kHelp:
      WriteOut(flags.Help());
      return kExitOk;
    case Action::kVersion:
      WriteOut(FullVersionText());
      return kExitOk;
    case Action::kRun:
      break;
  }
  return std::nullopt;
}

}  // namespace kvrelay::tools
