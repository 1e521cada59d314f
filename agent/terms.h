// On what terms a lease's bytes move, on either side.
#pragma once

#include <cstring>

#include "base/ids.h"
#include "transport/transport.h"

namespace kvrelay::agent {

// All that moves of one lease is one session: whatever the number of ranks, sources and streams, it
// gets the share of one.
inline transport::Terms TermsOf(const LeaseId& lease, Priority priority, TimePoint deadline) {
  uint64_t session = 0;  // random, as the id is
  std::memcpy(&session, lease.bytes.data(), sizeof(session));
  return {deadline, priority, session};
}

}  // namespace kvrelay::agent
