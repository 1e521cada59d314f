#include "transport/get_peers.h"

#include <glog/logging.h>

#include <algorithm>
#include <cstring>
#include <string>
#include <utility>

namespace kvrelay::transport {

void GetPeers::Connect(PeerHandle handle, const PeerSpec& spec, TimePoint deadline, TimePoint now) {
  const auto connecting = static_cast<size_t>(
      std::ranges::count_if(peers_, [](const auto& entry) { return entry.second.pad != nullptr; }));
  if (connecting >= kMaxConnecting) {
    return control_.Lost(
        handle, Status(Code::kOverloaded,
                       std::to_string(kMaxConnecting) + " peers are being connected already"));
  }
  auto way = GetWay::Open(worker_, spec, lanes_.cross_hosts ? nullptr : &self_);
  if (!way.has_value()) return control_.Lost(handle, way.error());
  Peer& peer = peers_[handle];
  peer.deadline = deadline;
  peer.incarnation = spec.incarnation;
  peer.way = std::move(*way);
  if (!peer.way->failure().ok()) return End(handle, peer, peer.way->failure(), now);
  peer.pad = pads_.Take();
  peer.way->GetBeacon({peer.pad, sizeof(Beacon)}, pads_.memory(), &peer.gets);
}

void GetPeers::Disconnect(PeerHandle handle, TimePoint now) {
  const auto it = peers_.find(handle);
  if (it == peers_.end()) return;
  End(handle, it->second, Status(Code::kCancelled, "disconnected"), now);
}

void GetPeers::DisconnectAll(const Status& why, TimePoint now) {
  for (auto& [handle, peer] : peers_) End(handle, peer, why, now);
}

std::shared_ptr<GetWay> GetPeers::Find(PeerHandle handle) const {
  const auto it = peers_.find(handle);
  if (it == peers_.end()) return nullptr;
  const Peer& peer = it->second;
  return peer.state == Peer::State::kConnected && peer.way->failure().ok() ? peer.way : nullptr;
}

TimePoint GetPeers::Look(TimePoint now, const GetReads& reads) {
  TimePoint next = TimePoint::max();
  for (auto it = peers_.begin(); it != peers_.end();) {
    auto& [handle, peer] = *it;
    GetWay& way = *peer.way;
    if (peer.pad != nullptr && peer.gets.in_flight == 0) TakeBeacon(handle, peer, now);
    if (peer.state == Peer::State::kConnecting && way.failure().ok()) {
      if (peer.deadline <= now) {
        End(handle, peer,
            Status(Code::kDeadlineExceeded,
                   "no one-sided read of it before the deadline (" + lanes_.names + ")"),
            now);
      } else {
        next = std::min(next, peer.deadline);
      }
    }
    if (!way.failure().ok()) {
      if (!way.ended()) way.End(way.failure(), now + GetWay::kDrainLimit);
      const GetReads::Use use = reads.UseOf(way);
      if (use.reads == 0) End(handle, peer, way.failure(), now);
      if (!way.closing()) {
        if (use.in_flight + peer.gets.in_flight > 0 && now < way.close_by()) {
          next = std::min(next, way.close_by());
        } else {
          way.Close();
          next = now;  // it may have closed at once
        }
      }
    }
    // A read may hold the way still, and its close holds it until all that it leaves behind is
    // over.
    const bool forgotten = peer.state == Peer::State::kOver && peer.pad == nullptr &&
                           way.closed() && peer.way.use_count() == 1;
    it = forgotten ? peers_.erase(it) : std::next(it);
  }
  return next;
}

void GetPeers::TakeBeacon(PeerHandle handle, Peer& peer, TimePoint now) {
  if (peer.state == Peer::State::kConnecting) {
    Beacon beacon;
    std::memcpy(&beacon, peer.pad, sizeof(beacon));
    if (peer.gets.failure != UCS_OK) {
      End(handle, peer,
          Status(Code::kPeerUnreachable,
                 std::string("no one-sided read of it: ") + ucs_status_string(peer.gets.failure)),
          now);
    } else if (beacon.magic != Beacon::kMagic || beacon.incarnation != peer.incarnation) {
      End(handle, peer, Status(Code::kPeerUnreachable, "another process than the handshake's"),
          now);
    } else {
      peer.state = Peer::State::kConnected;
      control_.Connected(handle);
    }
  }
  if (peer.way->Drained(peer.gets)) pads_.Give(std::exchange(peer.pad, nullptr));
}

void GetPeers::End(PeerHandle handle, Peer& peer, const Status& why, TimePoint now) {
  const Peer::State before = std::exchange(peer.state, Peer::State::kOver);
  if (before == Peer::State::kOver) return;
  peer.way->End(why, now + GetWay::kDrainLimit);
  if (before == Peer::State::kConnected) {
    if (why.code() == Code::kCancelled) return;  // it was ours to end
    LOG(INFO) << "ucx-get: " << peer.way->name() << ": " << why.message();
  }
  control_.Lost(handle, why);
}

size_t GetPeers::closing() const {
  return static_cast<size_t>(std::ranges::count_if(
      peers_, [](const auto& entry) { return entry.second.state == Peer::State::kOver; }));
}

void GetPeers::DropKeys() {
  for (auto& [handle, peer] : peers_) peer.way->DropKeys();
}

}  // namespace kvrelay::transport
