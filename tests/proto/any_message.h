// What tests do to every message alike, whatever its type: by table, so that each test is compiled
// once.
#pragma once

#include <cstddef>
#include <span>
#include <string>
#include <string_view>

#include "base/status.h"
#include "tests/proto/random_message.h"

namespace kvrelay::proto {

struct AnyMessage {
  std::string_view name;
  bool complete;                                    // all members of the struct are on the wire
  std::string (*initial)();                         // as constructed, encoded
  std::string (*random)(Random&);                   // one of random values, encoded
  Result<std::string> (*recode)(std::string_view);  // decoded and encoded again
};

// Every struct that Encode and Decode exist for.
std::span<const AnyMessage> AllMessages();

}  // namespace kvrelay::proto
