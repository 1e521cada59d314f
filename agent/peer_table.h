// Handshakes: what this rank knows of owner ranks, and by which path it reaches their memory. One
// handshake per peer incarnation; whoever needs the same peer meanwhile waits for the same answer.
#pragma once

#include <functional>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "agent/call.h"
#include "agent/env.h"
#include "agent/owner_rank.h"
#include "transport/transport.h"

namespace kvrelay::agent {

// A peer that is ready to be read from. Valid until it is seen to have died or was replaced by
// another incarnation.
struct ReadyPeer {
  struct Path {
    transport::Transport* transport = nullptr;
    transport::PeerHandle handle = 0;
  };
  proto::Meta meta;
  std::vector<Path> paths;  // in order of preference, at least one; the last moves any plan,
                            // unless there is no transport that does
  std::string why;          // "first choice", "not mapped: no shared socket folder"
};

// Control thread.
class PeerTable {
 public:
  using Ready = std::function<void(Result<std::shared_ptr<const ReadyPeer>>)>;

  // `transports` in order of preference; each is tried until one connects that moves any plan. They
  // outlive the table.
  PeerTable(Env& env, RankIdentity identity, std::vector<transport::Transport*> transports);
  ~PeerTable();

  // `ready` once, never inside the call, within kHandshakeTimeout (callers keep their own deadlines
  // beside it). `incarnation` is what the owner's leader said; when the process at the endpoint is
  // another one, the answer is kLeaseEnded, and a peer known from before is forgotten.
  void Get(const std::string& endpoint, uint32_t rank, Incarnation incarnation, Ready ready);
  static constexpr Duration kHandshakeTimeout = Millis(8000);
  // The same without a handshake: null when there was none, or with another incarnation.
  std::shared_ptr<const ReadyPeer> Find(const std::string& endpoint, Incarnation incarnation) const;
  // Forgets a peer, for example when a read showed it dead: the next Get shakes hands anew.
  void Forget(const std::string& endpoint);

  struct PeerInfo {
    std::string endpoint;
    EngineId engine;
    Incarnation incarnation = 0;
    uint32_t rank = 0;
    std::string state;  // "connecting", "ready"
    std::string path;
    std::string why;
    double rtt_ms = 0;
  };
  std::vector<PeerInfo> List() const;

 private:
  struct Peer;

  void Start(const std::string& endpoint, uint32_t rank);
  void OnMeta(const std::shared_ptr<Peer>& peer, const Result<std::string>& reply);
  void TryPath(const std::shared_ptr<Peer>& peer, size_t index);
  void Finish(const std::shared_ptr<Peer>& peer, Status status);
  Status CheckCompatible(const proto::Meta& meta, const std::string& who) const;

  Env& env_;
  const RankIdentity identity_;
  const std::vector<transport::Transport*> transports_;
  std::map<std::string, std::shared_ptr<Peer>> peers_;  // by endpoint
};

}  // namespace kvrelay::agent
