// One question to a daemon at a time, typed.
#pragma once

#include <string>

#include "agent/client.h"
#include "base/clock.h"
#include "base/status.h"
#include "proto/codec.h"
#include "proto/messages.h"
#include "tools/common/flags.h"
#include "tools/common/keys.h"

namespace kvrelay::tools {

// Owned by one thread at a time.
class Asker {
 public:
  // kInvalidArgument when `endpoint` is none, or what KeyFlags::Load says. Does not connect yet.
  static Result<Asker> Open(const std::string& endpoint, const KeyFlags& keys);

  const std::string& endpoint() const { return endpoint_; }
  agent::Client& client() { return client_; }

  // The reply, or the daemon's error, or why there is none; messages name the endpoint where the
  // peer could not.
  template <typename Reply, typename Request>
  Result<Reply> Ask(proto::Type type, const Request& request, Duration timeout) {
    KVRELAY_ASSIGN_OR_RETURN(const std::string body,
                             client_.Call(type, proto::Encode(request), timeout));
    return proto::Decode<Reply>(body);
  }

 private:
  Asker(std::string endpoint, agent::Client client)
      : endpoint_(std::move(endpoint)), client_(std::move(client)) {}
  std::string endpoint_;
  agent::Client client_;
};

// --timeout_ms of the commands that only look: 2000.
void AddTimeoutFlag(FlagSet& flags, uint32_t* timeout_ms);

}  // namespace kvrelay::tools
