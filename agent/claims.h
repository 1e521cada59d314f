// The reader engine's claims at owner engines: kept alive by one heartbeat per owner, and let go by
// batched releases.
#pragma once

#include <functional>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "agent/call.h"
#include "agent/env.h"

namespace kvrelay::agent {

// One owner engine's process, as a ticket names it.
struct OwnerKey {
  std::string front;
  Incarnation incarnation = 0;
  auto operator<=>(const OwnerKey&) const = default;
};

// Control thread of the reader's leader.
class Claims {
 public:
  Claims(Env& env, EngineKey reader);
  ~Claims();

  // From now on heartbeats name the lease. `lost` runs at most once, when the owner says that it
  // ended or that it restarted.
  void Hold(const OwnerKey& key, const LeaseId& lease, Duration ttl,
            std::function<void(Status)> lost);
  // Stops naming it and tells the owner so (also when no claim was ever answered): batched,
  // repeated until acknowledged or until the owner must have ended it by itself.
  void Release(const OwnerKey& key, const LeaseId& lease);

  size_t held() const;
  size_t unacknowledged() const;  // releases
  const EngineKey& reader() const { return reader_; }

 private:
  struct Claim {
    std::function<void(Status)> lost;
  };
  struct Owner {
    std::map<LeaseId, Claim> claims;
    Duration ttl{};
    Clock::TimerId beat_timer = 0;
    std::unique_ptr<RetryingCall> beat;

    std::vector<LeaseId> releasing;  // queued
    std::vector<LeaseId> in_flight;  // named by `release`
    Clock::TimerId release_timer = 0;
    std::unique_ptr<RetryingCall> release;
    int failures = 0;
  };

  void Beat(const OwnerKey& key);
  void OnBeat(const OwnerKey& key, const Result<std::string>& reply);
  void Flush(const OwnerKey& key);
  void DropIfIdle(const OwnerKey& key);

  Env& env_;
  const EngineKey reader_;
  std::map<OwnerKey, Owner> owners_;
};

}  // namespace kvrelay::agent
