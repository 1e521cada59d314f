#include "transport/packed_send.h"

#include <algorithm>
#include <numeric>
#include <utility>

#include "transport/chunk_copy.h"

namespace kvrelay::transport {
namespace {

// Slots that one reader may hold: one that has stopped reading leaves room for others.
constexpr uint32_t kLaneWindow = 4;
// How long a reader may take nothing while it holds slots that nobody waits for, or that others
// need.
constexpr Duration kStall = std::chrono::seconds(1);
constexpr uint64_t kPumpBytes = 1 << 20;

}  // namespace

PackedSender::PackedSender(std::span<const LocalRegion> regions, Device* device,
                           Incarnation incarnation, std::unique_ptr<SlotRing> ring,
                           PackedLanes& lanes, std::shared_ptr<Throttle> throttle, Deliver deliver)
    : deliver_(std::move(deliver)),
      device_(device),
      incarnation_(incarnation),
      ring_(std::move(ring)),
      lanes_(lanes),
      turns_(ring_->slot_bytes()),
      gate_(std::move(throttle)) {
  for (const LocalRegion& region : regions) {
    local_bases_.push_back(region.data);
    local_bytes_.push_back(region.bytes);
  }
}

void PackedSender::Start(Outgoing outgoing) {
  Completion refused;
  if (outgoing.plan.chunks == 0 || !outgoing.plan.plan_chunk || outgoing.record == nullptr) {
    refused.status = Status(Code::kInvalidArgument, "a stream without chunks or without a record");
  } else if (outgoing.plan.max_chunk_bytes > ring_->slot_bytes()) {
    refused.status = Status(Code::kInvalidArgument,
                            outgoing.reader_name + " asks for chunks of " +
                                std::to_string(outgoing.plan.max_chunk_bytes) +
                                " bytes, we send at most " + std::to_string(ring_->slot_bytes()));
  } else if (streams_.size() >= kMaxStreams) {
    refused.status =
        Status(Code::kOverloaded, std::to_string(kMaxStreams) + " streams are being sent already");
  } else {
    auto stream = std::make_shared<Stream>();
    stream->out = std::move(outgoing);
    stream->place = turns_.Enter(stream->out.terms);
    stream->left.resize(stream->out.plan.chunks);
    std::iota(stream->left.begin(), stream->left.end(), 0U);
    stream->last_ready = std::chrono::steady_clock::now();
    streams_.push_back(std::move(stream));
    return;
  }
  deliver_(std::move(outgoing.done), std::move(refused));
}

void PackedSender::Cancel(OpId op) {
  for (const auto& stream : streams_) {
    if (stream->out.op != op) continue;
    Stop(std::shared_ptr(stream), Status(Code::kCancelled, "cancelled"),
         std::chrono::steady_clock::now());
    return;
  }
}

void PackedSender::FailAll(const Status& status) {
  while (!streams_.empty()) Complete(std::shared_ptr(streams_.front()), status);
}

bool PackedSender::Pump(TimePoint now) {
  LookAtPacking(now);
  bool any = false;
  const auto may = [&](const std::shared_ptr<Stream>& stream) { return MaySend(*stream, now); };
  for (uint64_t bytes = 0; bytes < kPumpBytes && ring_->free() > 0;) {
    const auto next = NextInTurn(streams_, may);
    if (next == streams_.end()) break;
    const Next did = SendNext(std::shared_ptr(*next), now);
    if (did == Next::kMustWait) break;  // nobody overtakes it
    if (did == Next::kNotComputed) continue;
    any = true;
    bytes += ring_->slot_bytes();
  }
  return any || !packing_.empty();
}

bool PackedSender::MaySend(const Stream& stream, TimePoint now) const {
  const Outgoing& out = stream.out;
  const auto packing = std::ranges::count_if(
      packing_, [&](const Packing& p) { return p.stream->out.lane == out.lane; });
  return !stream.failed && !stream.left.empty() && stream.poll_at <= now && out.lane->usable() &&
         out.lane->in_flight() + static_cast<uint32_t>(packing) < kLaneWindow && out.done;
}

PackedSender::Next PackedSender::SendNext(const std::shared_ptr<Stream>& stream, TimePoint now) {
  const auto ready = FindReady(*stream, now);
  if (!ready.has_value()) {
    Stop(stream, ready.error(), now);
    return Next::kDid;
  }
  if (!ready->has_value()) return Next::kNotComputed;
  const uint64_t piece = stream->out.plan.max_chunk_bytes;
  if (!gate_.Begin(stream->place.priority(), piece, now)) return Next::kMustWait;
  const auto chunk = stream->left.begin() + static_cast<ptrdiff_t>(**ready);
  Slot* slot = ring_->Take();
  auto copy = BeginPacking(*stream, *chunk, *slot);
  if (!copy.has_value()) {
    ring_->Give(slot);
    gate_.End(piece, 0);
    Stop(stream, std::move(copy).error(), now);
    return Next::kDid;
  }
  gate_.End(piece - slot->header.bytes, 0);
  turns_.Moved(stream->place, slot->header.bytes);
  stream->left.erase(chunk);
  if (*copy == nullptr) {
    EndPacking(stream, slot, Status::Ok(), now);
  } else {
    ++stream->packing;
    packing_.push_back({stream, slot, *std::move(copy)});
  }
  return Next::kDid;
}

Result<std::optional<size_t>> PackedSender::FindReady(Stream& stream, TimePoint now) {
  const Outgoing& out = stream.out;
  if (!out.plan.extent_of) return 0;
  const GuardWords words = out.record->ReadBefore();
  if (!IsLease(out.want, words)) {
    return Error(Code::kStaleRead, "the lease ended before all chunks were computed");
  }
  const Progress progress = Progress::Unpack(words.w1);
  for (size_t i = 0; i < stream.left.size(); ++i) {
    if (!Covers(progress, out.plan.extent_of(stream.left[i]))) continue;
    stream.last_ready = now;
    return i;
  }
  stream.poll_at = now + PollPause(now - stream.last_ready);
  return std::nullopt;
}

Result<std::unique_ptr<DeviceCopy>> PackedSender::BeginPacking(Stream& stream, uint32_t chunk,
                                                               Slot& slot) {
  const Outgoing& out = stream.out;
  KVRELAY_ASSIGN_OR_RETURN(const CopyPlan plan, out.plan.plan_chunk(chunk));
  const uint64_t bytes = plan.bytes();
  if (bytes == 0 || bytes > ring_->slot_bytes()) {
    return Error(Code::kInternal, "chunk " + std::to_string(chunk) + " of " +
                                      std::to_string(bytes) + " bytes for a slot of " +
                                      std::to_string(ring_->slot_bytes()));
  }
  // The plan fills the first `bytes` of the slot and nothing else: what another stream left there
  // stays here.
  KVRELAY_RETURN_IF_ERROR(plan.Validate(local_bytes_, std::span(&bytes, 1)));
  std::byte* destination = slot.data.data();
  slot.header = {};
  slot.header.kind = PackedKind::kChunk;
  slot.header.chunk = chunk;
  slot.header.bytes = bytes;
  slot.header.before = out.record->ReadBefore();
  if (stream.left.size() == out.plan.chunks) stream.completion.before = slot.header.before;
  return BeginChunkCopy(device_, plan, local_bases_, std::span(&destination, 1),
                        /*whole_bytes=*/0);
}

void PackedSender::EndPacking(const std::shared_ptr<Stream>& stream, Slot* slot, Status packed,
                              TimePoint now) {
  const Outgoing& out = stream->out;
  PackedHeader& header = slot->header;
  header.after = out.record->ReadAfter();
  stream->completion.after = header.after;
  if (packed.ok() &&
      !GuardHolds(out.plan.Want(out.want, header.chunk), header.before, header.after)) {
    packed =
        Status(Code::kStaleRead, "the lease ended before chunk " + std::to_string(header.chunk) +
                                     " of " + std::to_string(out.plan.chunks) + " was packed");
  }
  if (!packed.ok()) {
    gate_.End(header.bytes, 0);
    ring_->Give(slot);
    return Stop(stream, std::move(packed), now);
  }
  ++stream->sent;
  Submit(stream, slot, now);
}

void PackedSender::LookAtPacking(TimePoint now) {
  for (auto it = packing_.begin(); it != packing_.end();) {
    std::optional<Status> ended = it->copy->Ended();
    if (!ended) {
      ++it;
      continue;
    }
    const Packing packed = std::move(*it);
    packing_.erase(it);
    --packed.stream->packing;
    EndPacking(packed.stream, packed.slot, *std::move(ended), now);
    it = packing_.begin();  // others of its stream may have been dropped
  }
}

void PackedSender::DropPacking(const Stream& stream) {
  std::erase_if(packing_, [&](Packing& packing) {
    if (packing.stream.get() != &stream) return false;
    packing.copy.reset();
    gate_.End(packing.slot->header.bytes, 0);
    ring_->Give(packing.slot);
    return true;
  });
}

void PackedSender::Submit(const std::shared_ptr<Stream>& stream, Slot* slot, TimePoint now) {
  PackedHeader& header = slot->header;
  header.stream = stream->out.stream;
  header.chunks = stream->out.plan.chunks;
  header.sender = incarnation_;
  Seal(header);
  ++stream->in_flight;
  stream->out.lane->SendSlot(
      slot, *ring_, now, [this, stream, bytes = header.bytes](Status status) {
        gate_.End(bytes, bytes);
        --stream->in_flight;
        stream->completion.bytes += bytes;
        if (!stream->out.done) return;  // completed already
        if (!status.ok()) {
          stream->failed = true;
        } else if (stream->left.empty() && stream->packing == 0 && stream->in_flight == 0) {
          Complete(stream, Status::Ok());
        }
      });
}

void PackedSender::Stop(const std::shared_ptr<Stream>& stream, Status status, TimePoint now) {
  if (stream->out.lane->usable()) {
    if (Slot* slot = ring_->Take(); slot != nullptr) {
      slot->header = {};
      slot->header.kind = PackedKind::kStopped;
      slot->header.code = static_cast<uint32_t>(status.code());
      slot->header.chunk = stream->sent;
      slot->header.before = stream->completion.before;
      slot->header.after = stream->completion.after;
      Complete(stream, std::move(status));
      Submit(stream, slot, now);
      return;
    }
  }
  Complete(stream, std::move(status));
}

void PackedSender::Complete(const std::shared_ptr<Stream>& stream, Status status) {
  DropPacking(*stream);
  Completion completion = stream->completion;
  completion.status = std::move(status);
  streams_.remove(stream);
  deliver_(std::exchange(stream->out.done, nullptr), std::move(completion));
}

TimePoint PackedSender::Expire(TimePoint now) {
  TimePoint next = gate_.retry_at(now);
  std::vector<std::shared_ptr<Stream>> ended;
  for (const auto& stream : streams_) {
    if (stream->failed || !stream->out.lane->usable() || stream->out.terms.deadline <= now) {
      ended.push_back(stream);
    } else {
      next = std::min(next, stream->out.terms.deadline);
      if (stream->poll_at > now) next = std::min(next, stream->poll_at);
    }
  }
  for (const auto& stream : ended) {
    const Outgoing& out = stream->out;
    if (out.lane->usable() && !stream->failed) {
      Stop(stream,
           Status(Code::kDeadlineExceeded, out.reader_name + ": the deadline came when " +
                                               std::to_string(stream->sent - stream->in_flight) +
                                               " of " + std::to_string(out.plan.chunks) +
                                               " chunks had been sent"),
           now);
    } else {
      Status lost = out.lane->failure();
      if (lost.ok()) lost = Status(Code::kPeerUnreachable, "a send failed");
      Complete(stream, lost.Wrap(out.reader_name));
    }
  }
  std::vector<std::shared_ptr<PackedLane>> stalled;
  for (const auto& [address, lane] : lanes_.open()) {
    if (lane->in_flight() == 0) continue;
    const TimePoint limit = lane->last_progress() + kStall;
    if (limit > now) {
      next = std::min(next, limit);
      continue;
    }
    const bool wanted =
        std::any_of(streams_.begin(), streams_.end(),
                    [&lane = lane](const auto& stream) { return stream->out.lane == lane; });
    if (!wanted || ring_->free() == 0) stalled.push_back(lane);
  }
  for (const auto& lane : stalled) {
    lanes_.Close(lane, Status(Code::kPeerUnreachable, "the reader took no data for a second"));
  }
  return next;
}

}  // namespace kvrelay::transport
