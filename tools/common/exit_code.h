// What the programs' exit statuses mean. Scripts branch on them; they never change.
#pragma once

#include "base/status.h"

namespace kvrelay::tools {

enum ExitCode : int {
  kExitOk = 0,
  kExitFailed = 1,       // the request failed, or something inside did
  kExitUsage = 2,        // usage, or a bad model or configuration: calling again changes nothing
  kExitUnreachable = 3,  // nobody answered in time
  kExitRefused = 4,      // somebody answered: incompatible or refused
  kExitBusy = 5,         // overloaded or draining: try again
  kExitCancelled = 130,  // ^C
};

ExitCode ExitCodeOf(Code code);
// The same for what a program reads before it starts (flags, model, addresses, memory): a missing
// model folder or a port in use is the configuration's fault, not a failed request.
ExitCode SetupExitCodeOf(Code code);

}  // namespace kvrelay::tools
