#include <algorithm>
#include <utility>

#include "agent/peer_table.h"
#include "kvcache/plan_pull.h"
#include "proto/codec.h"

namespace kvrelay::agent {
namespace {

constexpr RetryPolicy kMetaPolicy{.tries = 3, .per_try = Millis(2000), .pause = Millis(20)};
constexpr Duration kConnectTimeout = Millis(2000);  // of one path

// "ucx-get+ucx-packed"
std::string NamesOf(const std::vector<ReadyPeer::Path>& paths) {
  std::string names;
  for (const ReadyPeer::Path& path : paths) {
    names += (names.empty() ? "" : "+") + std::string(path.transport->name());
  }
  return names;
}

// "ucx-get over cma, ucx-packed for casts and short runs; not mapped: no shared socket folder"
std::string WhyOf(const std::vector<ReadyPeer::Path>& paths, const std::string& reasons) {
  std::string why;
  if (const std::string lanes = paths.front().transport->lanes(); !lanes.empty()) {
    why = std::string(paths.front().transport->name()) + " over " + lanes;
  }
  if (paths.size() > 1) {
    why += ", " + std::string(paths.back().transport->name()) + " for casts and short runs";
  }
  if (!reasons.empty()) why += (why.empty() ? "not " : "; not ") + reasons;
  return why.empty() ? "first choice" : why;
}

}  // namespace

struct PeerTable::Peer {
  std::string endpoint;
  uint32_t rank = 0;
  std::string who;
  TimePoint deadline;
  TimePoint asked;
  double rtt_ms = 0;
  std::unique_ptr<RetryingCall> call;
  proto::Meta meta;
  std::vector<ReadyPeer::Path> paths;      // connected
  std::string reasons;                     // of the paths not taken
  std::shared_ptr<const ReadyPeer> ready;  // set when done
  bool gone = false;                       // forgotten; late answers are dropped
  struct Waiter {
    Incarnation incarnation = 0;
    Ready ready;
  };
  std::vector<Waiter> waiters;

  // What a waiter gets now that the handshake is over.
  Result<std::shared_ptr<const ReadyPeer>> Answer(Incarnation wanted, const Status& status) const {
    if (!status.ok()) return Error(status);
    if (wanted != meta.incarnation) {
      return Error(Code::kLeaseEnded, who + " restarted since the lease was offered");
    }
    return ready;
  }
};

PeerTable::PeerTable(Env& env, RankIdentity identity, std::vector<transport::Transport*> transports)
    : env_(env), identity_(std::move(identity)), transports_(std::move(transports)) {}

PeerTable::~PeerTable() = default;

void PeerTable::Get(const std::string& endpoint, uint32_t rank, Incarnation incarnation,
                    Ready ready) {
  auto it = peers_.find(endpoint);
  if (it != peers_.end() && it->second->ready && it->second->meta.incarnation != incarnation) {
    Forget(endpoint);
    it = peers_.end();
  }
  if (it == peers_.end()) {
    Start(endpoint, rank);
    it = peers_.find(endpoint);
  }
  const auto& peer = it->second;
  if (peer->ready) {
    env_.clock.CallAfter({}, [peer = peer, ready = std::move(ready)] { ready(peer->ready); });
    return;
  }
  peer->waiters.push_back({incarnation, std::move(ready)});
}

std::shared_ptr<const ReadyPeer> PeerTable::Find(const std::string& endpoint,
                                                 Incarnation incarnation) const {
  const auto it = peers_.find(endpoint);
  if (it == peers_.end() || it->second->meta.incarnation != incarnation) return nullptr;
  return it->second->ready;
}

void PeerTable::Start(const std::string& endpoint, uint32_t rank) {
  auto peer = std::make_shared<Peer>();
  peer->endpoint = endpoint;
  peer->rank = rank;
  peer->who = env_.owner_role + " " + endpoint + " rank " + std::to_string(rank);
  peer->asked = env_.clock.Now();
  peer->deadline = peer->asked + kHandshakeTimeout;
  peers_[endpoint] = peer;
  const proto::GetMeta request{.engine = identity_.engine,
                               .incarnation = identity_.incarnation,
                               .rank = identity_.rank,
                               .model = identity_.model};
  peer->call = std::make_unique<RetryingCall>(
      env_.rpc, env_.clock, peer->who, endpoint, proto::Type::kGetMeta, proto::Encode(request),
      kMetaPolicy, peer->deadline,
      [this, weak = std::weak_ptr(peer)](const Result<std::string>& reply) {
        if (const auto peer = weak.lock()) OnMeta(peer, reply);
      });
}

void PeerTable::OnMeta(const std::shared_ptr<Peer>& peer, const Result<std::string>& reply) {
  if (peer->gone) return;
  if (!reply.has_value()) return Finish(peer, reply.error());
  auto meta = proto::Decode<proto::Meta>(*reply);
  if (!meta.has_value()) return Finish(peer, meta.error().Wrap(peer->who));
  peer->rtt_ms = ToMillis(env_.clock.Now() - peer->asked);
  peer->meta = std::move(*meta);
  if (Status status = CheckCompatible(peer->meta, peer->who); !status.ok()) {
    return Finish(peer, status);
  }
  TryPath(peer, 0);
}

// Whether the two caches can be pulled between is CheckServable's judgement alone; here is what it
// relies on, and that what the peer says of itself can be true.
Status PeerTable::CheckCompatible(const proto::Meta& meta, const std::string& who) const {
  if (meta.model != identity_.model) {
    const auto text = [](const std::string& name, const ContentHash& model,
                         const KvLayout& layout) {
      return name + " " + model.ToHex() + " (" + layout.ToString() + ")";
    };
    return {Code::kIncompatible, who + " does not fit: model there " +
                                     text(meta.model_name, meta.model, meta.layout) + ", here " +
                                     text(identity_.model_name, identity_.model, identity_.layout)};
  }
  KVRELAY_RETURN_IF_ERROR(CheckServable(meta.layout, meta.shard, identity_.layout, identity_.shard)
                              .Wrap(who + " does not fit"));
  std::vector<uint64_t> region_bytes;
  for (const proto::RegionInfo& region : meta.regions) region_bytes.push_back(region.bytes);
  KVRELAY_RETURN_IF_ERROR(meta.layout.Validate(region_bytes).Wrap(who));
  if (meta.table_hash_key.size() != HashKey{}.size() || meta.record_region >= region_bytes.size() ||
      uint64_t{meta.record_slots} * sizeof(LeaseRecord) > region_bytes[meta.record_region]) {
    return {Code::kIncompatible, who + " describes lease records that do not exist"};
  }
  return Status::Ok();
}

void PeerTable::TryPath(const std::shared_ptr<Peer>& peer, size_t index) {
  if (!peer->paths.empty() &&
      (index == transports_.size() || peer->paths.back().transport->moves_any_plan())) {
    peer->ready = std::make_shared<const ReadyPeer>(ReadyPeer{
        .meta = peer->meta, .paths = peer->paths, .why = WhyOf(peer->paths, peer->reasons)});
    return Finish(peer, Status::Ok());
  }
  if (index == transports_.size()) {
    return Finish(peer, {Code::kPeerUnreachable,
                         peer->who + ": no path to its memory (" + peer->reasons + ")"});
  }
  transport::Transport* transport = transports_[index];
  const auto add_reason = [peer, transport](const std::string& why) {
    if (!peer->reasons.empty()) peer->reasons += "; ";
    peer->reasons += std::string(transport->name()) + ": " + why;
  };
  const auto address = std::ranges::find(peer->meta.addresses, transport->name(),
                                         &proto::TransportAddress::transport);
  if (address == peer->meta.addresses.end() || address->address.empty()) {
    add_reason("the peer does not offer it");
    return TryPath(peer, index + 1);
  }
  transport::PeerSpec spec{.name = peer->who,
                           .address = address->address,
                           .region_bytes = {},
                           .incarnation = peer->meta.incarnation};
  for (const proto::RegionInfo& region : peer->meta.regions) {
    spec.region_bytes.push_back(region.bytes);
  }
  transport->Connect(
      std::move(spec), std::min(peer->deadline, env_.clock.Now() + kConnectTimeout),
      [this, peer, index, transport, add_reason](const Result<transport::PeerHandle>& handle) {
        if (peer->gone) {
          if (handle.has_value()) transport->Disconnect(*handle);
          return;
        }
        if (handle.has_value()) {
          peer->paths.push_back({transport, *handle});
        } else {
          add_reason(handle.error().message());
        }
        TryPath(peer, index + 1);
      },
      [this, weak = std::weak_ptr(peer)] {
        const auto dead = weak.lock();
        if (!dead || dead->gone) return;
        env_.counters.Add("kvrelay_peers_lost_total");
        Forget(dead->endpoint);
      });
}

void PeerTable::Finish(const std::shared_ptr<Peer>& peer, Status status) {
  env_.counters.Add(status.ok() ? "kvrelay_handshakes_total{outcome=\"ok\"}"
                                : "kvrelay_handshakes_total{outcome=\"failed\"}");
  const auto waiters = std::exchange(peer->waiters, {});
  if (!status.ok()) Forget(peer->endpoint);
  for (const auto& waiter : waiters) waiter.ready(peer->Answer(waiter.incarnation, status));
}

void PeerTable::Forget(const std::string& endpoint) {
  const auto it = peers_.find(endpoint);
  if (it == peers_.end()) return;
  const std::shared_ptr<Peer> peer = it->second;
  peers_.erase(it);
  peer->gone = true;
  peer->call.reset();
  for (const ReadyPeer::Path& path : peer->paths) path.transport->Disconnect(path.handle);
  for (const auto& waiter : std::exchange(peer->waiters, {})) {
    waiter.ready(Error(Code::kPeerUnreachable, peer->who + " went away during the handshake"));
  }
}

std::vector<PeerTable::PeerInfo> PeerTable::List() const {
  std::vector<PeerInfo> list;
  for (const auto& [endpoint, peer] : peers_) {
    list.push_back({.endpoint = endpoint,
                    .engine = peer->meta.engine,
                    .incarnation = peer->meta.incarnation,
                    .rank = peer->rank,
                    .state = peer->ready ? "ready" : "connecting",
                    .path = peer->ready ? NamesOf(peer->paths) : "",
                    .why = peer->ready ? peer->ready->why : peer->reasons,
                    .rtt_ms = peer->rtt_ms});
  }
  return list;
}

}  // namespace kvrelay::agent
