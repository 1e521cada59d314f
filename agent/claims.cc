#include "agent/claims.h"

#include <algorithm>
#include <utility>

#include "proto/codec.h"

namespace kvrelay::agent {
namespace {

constexpr Duration kBatch = Millis(1);  // releases of one loop's worth of work go together
constexpr size_t kMaxBatch = 1024;
constexpr int kMaxReleaseRounds = 8;  // then the owner's TTL and cap do it
constexpr RetryPolicy kOnce{.tries = 1, .per_try = Millis(2000), .pause = Millis(20)};

std::string Name(const Env& env, const OwnerKey& key) { return env.owner_role + " " + key.front; }

}  // namespace

Claims::Claims(Env& env, EngineKey reader) : env_(env), reader_(reader) {}

Claims::~Claims() {
  for (auto& [key, owner] : owners_) {
    env_.clock.Cancel(owner.beat_timer);
    env_.clock.Cancel(owner.release_timer);
  }
}

void Claims::Hold(const OwnerKey& key, const LeaseId& lease, Duration ttl,
                  std::function<void(Status)> lost) {
  Owner& owner = owners_[key];
  owner.claims[lease] = {std::move(lost)};
  owner.ttl = owner.claims.size() == 1 ? ttl : std::min(owner.ttl, ttl);
  if (owner.beat_timer == 0 && !owner.beat) {
    owner.beat_timer = env_.clock.CallAfter(owner.ttl / 3, [this, key] { Beat(key); });
  }
}

void Claims::Beat(const OwnerKey& key) {
  Owner& owner = owners_.at(key);
  owner.beat_timer = 0;
  proto::Heartbeat heartbeat{
      .reader = reader_.engine, .reader_incarnation = reader_.incarnation, .leases = {}};
  for (const auto& [lease, claim] : owner.claims) heartbeat.leases.push_back(lease);
  const Duration period = owner.ttl / 3;
  owner.beat = std::make_unique<RetryingCall>(
      env_.rpc, env_.clock, Name(env_, key), key.front, proto::Type::kHeartbeat,
      proto::Encode(heartbeat), RetryPolicy{.tries = 1, .per_try = period, .pause = Millis(1)},
      env_.clock.Now() + period,
      [this, key](const Result<std::string>& reply) { OnBeat(key, reply); });
}

void Claims::OnBeat(const OwnerKey& key, const Result<std::string>& reply) {
  Owner& owner = owners_.at(key);
  owner.beat.reset();
  std::vector<std::pair<std::function<void(Status)>, Status>> lost;
  if (reply.has_value()) {
    const auto beat = proto::Decode<proto::HeartbeatReply>(*reply);
    if (beat.has_value() && beat->incarnation != key.incarnation) {
      for (auto& [lease, claim] : owner.claims) {
        lost.emplace_back(std::move(claim.lost),
                          Status(Code::kLeaseEnded, Name(env_, key) + " restarted"));
      }
      owner.claims.clear();
    } else if (beat.has_value()) {
      for (const LeaseId& lease : beat->ended) {
        const auto it = owner.claims.find(lease);
        if (it == owner.claims.end()) continue;
        lost.emplace_back(std::move(it->second.lost),
                          Status(Code::kLeaseEnded, Name(env_, key) + " says that lease " +
                                                        lease.ToHex().substr(0, 8) + " ended"));
        owner.claims.erase(it);
      }
    }
  }
  // A heartbeat without an answer decides nothing: the guard does, and the pull's own deadline.
  if (!owner.claims.empty()) {
    owner.beat_timer = env_.clock.CallAfter(owner.ttl / 3, [this, key] { Beat(key); });
  } else {
    DropIfIdle(key);
  }
  for (auto& [fn, status] : lost) fn(status);
}

void Claims::Release(const OwnerKey& key, const LeaseId& lease) {
  Owner& owner = owners_[key];
  owner.claims.erase(lease);
  if (owner.claims.empty()) {
    env_.clock.Cancel(std::exchange(owner.beat_timer, 0));
    owner.beat.reset();
  }
  owner.releasing.push_back(lease);
  if (owner.release_timer == 0 && !owner.release) {
    owner.release_timer = env_.clock.CallAfter(kBatch, [this, key] { Flush(key); });
  }
}

void Claims::Flush(const OwnerKey& key) {
  Owner& owner = owners_.at(key);
  owner.release_timer = 0;
  const size_t take = std::min(kMaxBatch, owner.releasing.size());
  owner.in_flight.assign(owner.releasing.begin(),
                         owner.releasing.begin() + static_cast<ptrdiff_t>(take));
  owner.releasing.erase(owner.releasing.begin(),
                        owner.releasing.begin() + static_cast<ptrdiff_t>(take));
  const proto::Release release{.reader = reader_.engine,
                               .reader_incarnation = reader_.incarnation,
                               .leases = owner.in_flight};
  owner.release = std::make_unique<RetryingCall>(
      env_.rpc, env_.clock, Name(env_, key), key.front, proto::Type::kRelease,
      proto::Encode(release), kOnce, env_.clock.Now() + kOnce.per_try,
      [this, key](const Result<std::string>& reply) {
        Owner& done = owners_.at(key);
        done.release.reset();
        Duration pause = kBatch;
        if (reply.has_value() || ++done.failures >= kMaxReleaseRounds) {
          if (!reply.has_value()) env_.counters.Add("kvrelay_releases_given_up_total");
          done.failures = 0;
        } else {
          done.releasing.insert(done.releasing.begin(), done.in_flight.begin(),
                                done.in_flight.end());
          pause = Millis(50) * done.failures;
        }
        done.in_flight.clear();
        if (!done.releasing.empty()) {
          done.release_timer = env_.clock.CallAfter(pause, [this, key] { Flush(key); });
        } else {
          DropIfIdle(key);
        }
      });
}

void Claims::DropIfIdle(const OwnerKey& key) {
  const auto it = owners_.find(key);
  if (it == owners_.end()) return;
  const Owner& owner = it->second;
  if (owner.claims.empty() && owner.releasing.empty() && owner.in_flight.empty() && !owner.beat &&
      owner.beat_timer == 0) {
    owners_.erase(it);
  }
}

size_t Claims::held() const {
  size_t n = 0;
  for (const auto& [key, owner] : owners_) n += owner.claims.size();
  return n;
}

size_t Claims::unacknowledged() const {
  size_t n = 0;
  for (const auto& [key, owner] : owners_) n += owner.releasing.size() + owner.in_flight.size();
  return n;
}

}  // namespace kvrelay::agent
