// What `kvrelay generate` was asked for.
#pragma once

#include <string>

#include "base/status.h"
#include "proto/messages.h"
#include "tools/common/engine_flags.h"
#include "tools/common/flags.h"
#include "tools/common/keys.h"

namespace kvrelay::tools {

struct GenerateOptions {
  std::string decode;  // endpoint; empty with --local
  KeyFlags keys;
  bool local = false;
  EngineFlags engine;  // --local only
  proto::Generate request;
  bool json = false;
  std::string log_level = "warning";

  // Declares every flag; the targets are in this object, which must not move from here on.
  void Declare(FlagSet& flags);
  // Flags that do not go together, or are missing; fills in decode's full form and a request id.
  Status Check(const FlagSet& flags);
};

}  // namespace kvrelay::tools
