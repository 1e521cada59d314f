#include "tools/kvrelay/ask.h"

#include "proto/limits.h"
#include "tools/common/endpoint.h"

namespace kvrelay::tools {

Result<Asker> Asker::Open(const std::string& endpoint, const KeyFlags& keys) {
  KVRELAY_ASSIGN_OR_RETURN(const Endpoint at, ParseEndpoint(endpoint, AnyPort::kForbidden));
  KVRELAY_ASSIGN_OR_RETURN(auto identity, keys.Load({&at, 1}));
  KVRELAY_ASSIGN_OR_RETURN(agent::Client client,
                           agent::Client::Connect(at.ToString(), std::move(identity)));
  return Asker(at.ToString(), std::move(client));
}

void AddTimeoutFlag(FlagSet& flags, uint32_t* timeout_ms) {
  flags.Whole("timeout_ms", timeout_ms, 1, proto::kMaxDurationMs,
              "how long to wait for an answer, in milliseconds");
}

}  // namespace kvrelay::tools
