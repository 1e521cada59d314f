// kvrelay: talks to kvrelayd, and runs a model in one process to compare with.
#include <algorithm>
#include <array>
#include <string>
#include <string_view>
#include <vector>

#include "tools/common/exit_code.h"
#include "tools/common/flag_text.h"
#include "tools/common/flags.h"
#include "tools/common/output.h"
#include "tools/common/start.h"
#include "tools/common/version.h"
#include "tools/kvrelay/command.h"

namespace kvrelay::tools {
namespace {

struct Command {
  std::string_view name;
  std::string_view summary;
  int (*run)(CommandArgs args);
};

constexpr std::array<Command, 8> kCommands = {{
    {"generate", "generates text with a decode daemon, or in this process (--local)",
     GenerateCommand},
    {"inspect", "shows a daemon's cache, leases, peers, prefixes and counters", InspectCommand},
    {"health", "tells by its exit status whether a daemon takes requests", HealthCommand},
    {"ping", "measures the handshake and the round trips to a daemon", PingCommand},
    {"keygen", "makes a key pair, for daemons that ask for keys", KeygenCommand},
    {"backends", "shows which attention a model gets on this machine, and why", BackendsCommand},
    {"bench", "measures this build on this machine", BenchCommand},
    {"demo", "prefill and decode daemons side by side on the bundled model", DemoCommand},
}};

std::string Overview() {
  std::string text =
      "Usage: kvrelay COMMAND [flags]\n\n"
      "Moves the KV cache of a prompt from the process that computed it to the one that decodes "
      "it.\n\n"
      "Commands:\n";
  for (const Command& command : kCommands) text += HelpEntry(command.name, command.summary, 14);
  return text +
         "\nkvrelay COMMAND --help shows a command's flags, kvrelay --version what it is built "
         "from.\n"
         "The daemons are kvrelayd: see kvrelayd --help.\n\n"
         "Example:\n  kvrelay demo\n";
}

int Main(const std::vector<std::string>& args) {
  if (args.empty()) {
    WriteErrorLine(Overview());
    return kExitUsage;
  }
  const std::string& name = args.front();
  if (name == "--help" || name == "-h" || name == "help") {
    WriteOut(Overview());
    return kExitOk;
  }
  if (name == "--version") {
    WriteOut(FullVersionText());
    return kExitOk;
  }
  const auto* const command = std::find_if(kCommands.begin(), kCommands.end(),
                                           [&](const Command& c) { return c.name == name; });
  if (command == kCommands.end()) {
    std::vector<std::string> names;
    names.reserve(kCommands.size());
    for (const Command& c : kCommands) names.emplace_back(c.name);
    ReportFailure(
        "kvrelay",
        {Code::kInvalidArgument, "no command '" + name + "': there are " + Join(names, ", ")}, "",
        AsksForJson(args));
    return kExitUsage;
  }
  return command->run(CommandArgs(args).subspan(1));
}

}  // namespace
}  // namespace kvrelay::tools

int main(int argc, char** argv) {
  kvrelay::tools::PrepareStandardStreams();
  return kvrelay::tools::Main(kvrelay::tools::Arguments(argc, argv));
}
