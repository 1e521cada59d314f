// Addresses of daemons as people write them.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "base/status.h"

namespace kvrelay::tools {

struct Endpoint {
  std::string host;   // "127.0.0.1", "::1" (without brackets), "node7", "*"
  uint16_t port = 0;  // 0: any, where that is allowed

  std::string ToString() const;  // "tcp://127.0.0.1:7601"
  bool IsLoopback() const;       // 127.0.0.0/8, ::1, localhost
  bool IsWildcard() const;       // 0.0.0.0, ::, *
};

enum class AnyPort : uint8_t { kAllowed, kForbidden };

// "tcp://HOST:PORT" or "HOST:PORT"; IPv6 addresses in brackets.
Result<Endpoint> ParseEndpoint(std::string_view text, AnyPort any_port);
// Comma-separated; nothing twice.
Result<std::vector<Endpoint>> ParseEndpoints(std::string_view text);

}  // namespace kvrelay::tools
