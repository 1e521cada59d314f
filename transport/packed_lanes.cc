#include "transport/packed_lanes.h"

#include <algorithm>
#include <utility>

#include "transport/packed_wire.h"

namespace kvrelay::transport {

Status PackedLane::failure() const {
  if (!why_closed_.ok()) return why_closed_;
  return endpoint_->failure();
}

void PackedLane::SendSlot(Slot* slot, SlotRing& ring, TimePoint now, PackedEndpoint::Sent sent) {
  if (in_flight_ == 0) last_progress_ = now;
  ++in_flight_;
  endpoint_->Send(std::as_bytes(std::span(&slot->header, 1)), slot->data.first(slot->header.bytes),
                  [this, slot, &ring, sent = std::move(sent)](Status status) {
                    --in_flight_;
                    if (endpoint_->closing()) {
                      held_.emplace_back(slot, &ring);
                    } else {
                      ring.Give(slot);
                      last_progress_ = std::chrono::steady_clock::now();
                    }
                    sent(std::move(status));
                  });
}

void PackedLane::SendOwned(PackedHeader header, std::string data) {
  struct Message {
    PackedHeader header;
    std::string data;
  };
  header.bytes = data.size();
  Seal(header);
  auto message = std::make_shared<Message>(Message{header, std::move(data)});
  endpoint_->Send(std::as_bytes(std::span(&message->header, 1)),
                  std::as_bytes(std::span(message->data)), [message](Status) {});
}

Result<std::shared_ptr<PackedLane>> PackedLanes::Open(const std::string& encoded,
                                                      Incarnation incarnation, TimePoint now) {
  KVRELAY_ASSIGN_OR_RETURN(const PackedAddress address, PackedAddress::Decode(encoded));
  if (address.incarnation != incarnation) {
    return Error(Code::kInvalidArgument, "the address is one of another incarnation");
  }
  if (const auto it = open_.find(encoded); it != open_.end()) {
    if (it->second->usable()) {
      it->second->last_used_ = now;
      return it->second;
    }
    Close(it->second, it->second->failure());
  }
  if (open_.size() + closing_.size() >= kMaxLanes) {
    return Error(Code::kOverloaded,
                 std::to_string(kMaxLanes) + " connections are open or closing already");
  }
  KVRELAY_ASSIGN_OR_RETURN(std::unique_ptr<PackedEndpoint> endpoint, carrier_.Connect(address));
  auto lane = std::make_shared<PackedLane>(std::move(endpoint));
  lane->last_used_ = now;
  lane->last_progress_ = now;
  open_[encoded] = lane;
  return lane;
}

void PackedLanes::Close(const std::shared_ptr<PackedLane>& lane, Status why) {
  if (lane->endpoint_->closing()) return;
  lane->why_closed_ = std::move(why);
  lane->endpoint_->Close();
  closing_.push_back(lane);
  std::erase_if(open_, [&](const auto& entry) { return entry.second == lane; });
}

void PackedLanes::CloseAll() {
  while (!open_.empty()) {
    const std::shared_ptr<PackedLane> lane = open_.begin()->second;
    Close(lane, Status(Code::kPeerUnreachable, "the transport is closing"));
  }
}

void PackedLanes::Reap() {
  std::vector<std::shared_ptr<PackedLane>> failed;
  std::vector<std::shared_ptr<PackedLane>> idle;
  for (const auto& [address, lane] : open_) {
    if (!lane->usable()) {
      failed.push_back(lane);
    } else if (lane.use_count() == 1 && lane->in_flight_ == 0) {
      idle.push_back(lane);
    }
  }
  for (const auto& lane : failed) Close(lane, lane->failure());
  if (idle.size() > kMaxIdle) {
    std::sort(idle.begin(), idle.end(),
              [](const auto& a, const auto& b) { return a->last_used_ < b->last_used_; });
    idle.resize(idle.size() - kMaxIdle);
    for (const auto& lane : idle) {
      Close(lane, Status(Code::kPeerUnreachable, "not used for the longest time"));
    }
  }
  closing_.remove_if([](const std::shared_ptr<PackedLane>& lane) {
    if (!lane->endpoint_->finished()) return false;
    for (const auto& [slot, ring] : lane->held_) ring->Give(slot);
    lane->held_.clear();
    return true;
  });
}

}  // namespace kvrelay::transport
