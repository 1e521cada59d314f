// Addresses of daemons as people write them.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "base/status.h"
#include "transport/curve.h"

namespace kvrelay::tools {

struct Endpoint {
  std::string host;   // "127.0.0.1", "::1" (without brackets), "node7", "*"
  uint16_t port = 0;  // 0: any, where that is allowed
  std::optional<transport::CurveKey> key = {};  // public, of who listens there

  std::string ToString() const;  // "tcp://127.0.0.1:7601", "tcp://10.0.0.7:7601#KEY"
  bool IsLoopback() const;       // 127.0.0.0/8, ::1, localhost
  bool IsWildcard() const;       // 0.0.0.0, ::, *
};

enum class AnyPort : uint8_t { kAllowed, kForbidden };

// "tcp://HOST:PORT" or "HOST:PORT", either with "#KEY"; IPv6 addresses in brackets.
Result<Endpoint> ParseEndpoint(std::string_view text, AnyPort any_port);
// Comma-separated; nothing twice.
Result<std::vector<Endpoint>> ParseEndpoints(std::string_view text);

}  // namespace kvrelay::tools
