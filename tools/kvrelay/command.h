// The commands of kvrelay. Each parses its own flags, writes results to stdout, and returns the
// exit status.
#pragma once

#include <span>
#include <string>

namespace kvrelay::tools {

using CommandArgs = std::span<const std::string>;  // behind the command's name

int GenerateCommand(CommandArgs args);
int InspectCommand(CommandArgs args);
int HealthCommand(CommandArgs args);
int PingCommand(CommandArgs args);
int KeygenCommand(CommandArgs args);
int BackendsCommand(CommandArgs args);
int DemoCommand(CommandArgs args);
int BenchCommand(CommandArgs args);

}  // namespace kvrelay::tools
