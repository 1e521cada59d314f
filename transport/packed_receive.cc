#include "transport/packed_receive.h"

#include <algorithm>
#include <cstring>
#include <optional>
#include <utility>

#include "transport/chunk_copy.h"

namespace kvrelay::transport {

PackedReceiver::PackedReceiver(std::span<const LocalRegion> regions, Device* device,
                               std::unique_ptr<SlotRing> ring, Deliver deliver)
    : deliver_(std::move(deliver)), device_(device), ring_(std::move(ring)) {
  for (const LocalRegion& region : regions) {
    local_bases_.push_back(region.data);
    local_bytes_.push_back(region.bytes);
  }
}

void PackedReceiver::Start(Expected expected) {
  Completion refused;
  if (expected.plan.chunks == 0 || !expected.plan.plan_chunk) {
    refused.status = Status(Code::kInvalidArgument, "a stream without chunks");
  } else if (streams_.contains(expected.stream)) {
    refused.status =
        Status(Code::kInvalidArgument, "stream " + std::to_string(expected.stream) + " is in use");
  } else if (streams_.size() >= kMaxStreams) {
    refused.status = Status(Code::kOverloaded,
                            std::to_string(kMaxStreams) + " streams are being received already");
  } else {
    const StreamId id = expected.stream;
    Stream& stream = streams_[id];
    stream.expected = std::move(expected);
    stream.have.resize(stream.expected.plan.chunks);
    return;
  }
  deliver_(std::move(expected.done), std::move(refused));
}

void PackedReceiver::Cancel(OpId op) {
  for (auto it = streams_.begin(); it != streams_.end(); ++it) {
    if (it->second.expected.op != op) continue;
    Complete(it, Status(Code::kCancelled, "cancelled"));
    return;
  }
}

void PackedReceiver::FailPeer(PeerHandle peer, const Status& status) {
  for (auto it = streams_.begin(); it != streams_.end();) {
    it = it->second.expected.peer == peer ? Complete(it, status) : std::next(it);
  }
}

void PackedReceiver::FailAll(const Status& status) {
  for (auto it = streams_.begin(); it != streams_.end();) it = Complete(it, status);
}

TimePoint PackedReceiver::Expire(TimePoint now) {
  TimePoint next = TimePoint::max();
  for (auto it = streams_.begin(); it != streams_.end();) {
    const Expected& expected = it->second.expected;
    if (expected.deadline > now) {
      next = std::min(next, expected.deadline);
      ++it;
      continue;
    }
    Status late(Code::kDeadlineExceeded, expected.peer_name + ": the deadline came after " +
                                             std::to_string(it->second.arrived) + " of " +
                                             std::to_string(expected.plan.chunks) +
                                             " chunks had arrived");
    it = Complete(it, std::move(late));
  }
  return next;
}

void PackedReceiver::OnMessage(const PackedHeader& header, std::span<const std::byte> data) {
  while (ring_ != nullptr && ring_->free() == 0) LookAtUnpacking();
  const auto it = streams_.find(header.stream);
  if (it == streams_.end() || it->second.expected.incarnation != header.sender) {
    ++dropped_;
    return;
  }
  OnUnpacked(it, Take(it->second, header, data));
}

void PackedReceiver::OnUnpacked(Streams::iterator it, const Status& status) {
  const Stream& stream = it->second;
  if (!status.ok()) {
    Complete(it, status.Wrap(stream.expected.peer_name));
  } else if (stream.arrived == stream.expected.plan.chunks && stream.unpacking == 0) {
    Complete(it, Status::Ok());
  }
}

bool PackedReceiver::LookAtUnpacking() {
  for (auto it = unpacking_.begin(); it != unpacking_.end();) {
    std::optional<Status> ended = it->copy->Ended();
    if (!ended) {
      ++it;
      continue;
    }
    const Unpacking unpacked = std::move(*it);
    unpacking_.erase(it);
    ring_->Give(unpacked.slot);
    const auto stream = streams_.find(unpacked.stream);
    --stream->second.unpacking;
    if (ended->ok()) stream->second.completion.bytes += unpacked.bytes;
    OnUnpacked(stream, *ended);
    it = unpacking_.begin();  // others of its stream may have been dropped
  }
  return !unpacking_.empty();
}

Status PackedReceiver::Take(Stream& stream, const PackedHeader& header,
                            std::span<const std::byte> data) {
  const Expected& expected = stream.expected;
  if (stream.arrived == 0) stream.completion.before = header.before;
  stream.completion.after = header.after;
  if (header.kind == PackedKind::kStopped) {
    const Code code = header.code == static_cast<uint32_t>(Code::kStaleRead)
                          ? Code::kStaleRead
                          : Code::kPeerUnreachable;
    return Error(code, "the owner stopped the stream after " + std::to_string(header.chunk) +
                           " of " + std::to_string(expected.plan.chunks) + " chunks" +
                           (code == Code::kStaleRead ? ": the lease has ended" : ""));
  }
  if (header.chunks != expected.plan.chunks || header.chunk >= header.chunks) {
    return Error(Code::kInternal, "chunk " + std::to_string(header.chunk) + " of " +
                                      std::to_string(header.chunks) + " came in a stream of " +
                                      std::to_string(expected.plan.chunks) + " chunks");
  }
  if (stream.have[header.chunk]) {
    return Error(Code::kInternal, "chunk " + std::to_string(header.chunk) + " came twice");
  }
  if (!GuardHolds(expected.plan.Want(expected.want, header.chunk), header.before, header.after)) {
    return Error(Code::kStaleRead,
                 "the lease ended while chunk " + std::to_string(header.chunk) + " was packed");
  }
  KVRELAY_ASSIGN_OR_RETURN(const CopyPlan plan, expected.plan.plan_chunk(header.chunk));
  if (plan.src_bytes() != data.size()) {
    return Error(Code::kInternal, "chunk " + std::to_string(header.chunk) + " has " +
                                      std::to_string(data.size()) + " bytes, its plan " +
                                      std::to_string(plan.src_bytes()));
  }
  const uint64_t chunk_bytes = data.size();
  KVRELAY_RETURN_IF_ERROR(plan.Validate(std::span(&chunk_bytes, 1), local_bytes_));
  stream.have[header.chunk] = true;
  ++stream.arrived;
  return Unpack(stream, plan, data);
}

Status PackedReceiver::Unpack(Stream& stream, const CopyPlan& plan,
                              std::span<const std::byte> data) {
  const std::byte* source = data.data();
  Slot* slot = nullptr;
  if (ring_ != nullptr) {
    if (data.size() > ring_->slot_bytes()) {
      return Error(Code::kInternal, "a chunk of " + std::to_string(data.size()) +
                                        " bytes, we stage at most " +
                                        std::to_string(ring_->slot_bytes()));
    }
    slot = ring_->Take();
    std::memcpy(slot->data.data(), data.data(), data.size());
    source = slot->data.data();
  }
  const StreamPlan& whole = stream.expected.plan;
  auto copy = BeginChunkCopy(device_, plan, std::span(&source, 1), local_bases_,
                             whole.chunks * whole.max_chunk_bytes);
  if (!copy.has_value()) {
    ring_->Give(slot);
    return std::move(copy).error();
  }
  if (*copy == nullptr) {
    stream.completion.bytes += data.size();
  } else {
    ++stream.unpacking;
    unpacking_.push_back({stream.expected.stream, data.size(), slot, *std::move(copy)});
  }
  return {};
}

PackedReceiver::Streams::iterator PackedReceiver::Complete(Streams::iterator it, Status status) {
  Stream stream = std::move(it->second);
  it = streams_.erase(it);
  std::erase_if(unpacking_, [&](Unpacking& unpacking) {
    if (unpacking.stream != stream.expected.stream) return false;
    unpacking.copy.reset();  // waits for the device
    ring_->Give(unpacking.slot);
    return true;
  });
  stream.completion.status = std::move(status);
  deliver_(std::move(stream.expected.done), std::move(stream.completion));
  return it;
}

}  // namespace kvrelay::transport
