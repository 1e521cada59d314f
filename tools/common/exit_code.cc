#include "tools/common/exit_code.h"

namespace kvrelay::tools {

ExitCode ExitCodeOf(Code code) {
  switch (code) {
    case Code::kOk:
      return kExitOk;
    case Code::kInvalidArgument:
    case Code::kTooLarge:
      return kExitUsage;
    case Code::kPeerUnreachable:
    case Code::kDeadlineExceeded:
      return kExitUnreachable;
    case Code::kIncompatible:
    case Code::kRefused:
      return kExitRefused;
    case Code::kOverloaded:
    case Code::kDraining:
      return kExitBusy;
    case Code::kCancelled:
      return kExitCancelled;
    case Code::kInternal:
    case Code::kNotFound:
    case Code::kLeaseEnded:
    case Code::kStaleRead:
    case Code::kResourceExhausted:
      return kExitFailed;
  }
  return kExitFailed;
}

ExitCode SetupExitCodeOf(Code code) {
  switch (code) {
    case Code::kOk:
      return kExitOk;
    case Code::kInternal:
      return kExitFailed;
    case Code::kCancelled:
      return kExitCancelled;
    default:
      return kExitUsage;
  }
}

}  // namespace kvrelay::tools
