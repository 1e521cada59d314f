#include "agent/env.h"

#include <cstring>

namespace kvrelay::agent {

LeaseId Env::RandomLeaseId() const {
  LeaseId id;
  const uint64_t words[2] = {random(), random()};
  static_assert(sizeof(words) == sizeof(id.bytes));
  std::memcpy(id.bytes.data(), words, sizeof(words));
  return id;
}

}  // namespace kvrelay::agent
