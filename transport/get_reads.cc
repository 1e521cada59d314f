#include "transport/get_reads.h"

#include <algorithm>
#include <string>
#include <utility>

namespace kvrelay::transport {
namespace {

// Posted before the thread looks around: over cma they are copied by then, in about a millisecond.
constexpr uint64_t kTurnBytes = 4 << 20;

}  // namespace

GetReads::GetReads(std::span<const LocalRegion> regions,
                   std::span<const std::unique_ptr<UcxMemory>> memory, GuardPads& pads,
                   const ControlSide& control, std::shared_ptr<Throttle> throttle)
    : memory_(memory),
      pads_(pads),
      control_(control),
      gate_(std::move(throttle)),
      turns_(gate_.PieceBytes(kTurnBytes)) {
  for (const LocalRegion& region : regions) {
    local_bases_.push_back(region.data);
    local_bytes_.push_back(region.bytes);
  }
}

void GetReads::Start(Order order) {
  const GetWay& way = *order.way;
  if (Status status = CheckGuard(order.guard, way.region_bytes()); !status.ok()) {
    return control_.Refuse(std::move(order.done), status.Wrap(way.name()));
  }
  if (reads_.size() >= kMaxReads) {
    return control_.Refuse(
        std::move(order.done),
        Status(Code::kOverloaded, std::to_string(kMaxReads) + " reads are in flight already"));
  }
  std::byte* pad = pads_.Take();
  reads_.push_back({.id = order.op,
                    .deadline = order.terms.deadline,
                    .place = turns_.Enter(order.terms),
                    .done = std::move(order.done),
                    .way = std::move(order.way),
                    .pad = pad,
                    .read = GetRead(std::move(order.next), order.guard,
                                    {.regions = local_bases_,
                                     .region_bytes = local_bytes_,
                                     .memory = memory_,
                                     .guard = pad,
                                     .guard_memory = &pads_.memory()})});
}

void GetReads::Cancel(OpId id, TimePoint now) {
  for (Op& op : reads_) {
    if (op.id == id) End(op, Status(Code::kCancelled, "cancelled"), now);
  }
}

bool GetReads::Step(TimePoint now) {
  bool busy = false;
  // What is posted is on its way and goes before whatever comes later: nothing is, as long as
  // something more urgent is left to post.
  Priority urgent = Priority::kPrefetch;
  uint64_t room = kTurnBytes;
  // What has ended makes room for whose turn it is, not for its own read's next piece.
  for (Op& op : reads_) {
    if (op.read.gets().in_flight == 0) Discharge(op);
  }
  reads_.sort([](const Op& a, const Op& b) { return a.place.Before(b.place); });
  for (auto it = reads_.begin(); it != reads_.end();) {
    const auto op = it++;
    if (!op->ended.ok() || !op->way->failure().ok() || op->read.poll_at() > now) continue;
    const uint64_t before = op->read.bytes();
    uint64_t piece = op->place.priority() < urgent ? 0 : gate_.PieceBytes(room);
    if (piece > 0 && !gate_.Begin(op->place.priority(), piece, now)) piece = 0;
    const GetRead::State state = op->read.Step(*op->way, now, piece);
    const uint64_t posted = op->read.bytes() - before;
    if (piece > 0) gate_.End(piece - posted, 0);
    op->charged += posted;
    room -= std::min(room, posted);
    turns_.Moved(op->place, posted);
    if (op->read.has_more()) urgent = op->place.priority();
    switch (state) {
      case GetRead::State::kBusy:
        busy = true;
        break;
      case GetRead::State::kInFlight:
      case GetRead::State::kWaiting:
        break;
      case GetRead::State::kDone:
        Complete(op, Status::Ok());
        busy = true;
        break;
      case GetRead::State::kFailed:
        End(*op, op->read.failure().Wrap(op->way->name()), now);
        if (op->read.gets().failure != UCS_OK) {
          op->way->End(op->read.failure(), now + GetWay::kDrainLimit);
        }
        busy = true;
        break;
    }
  }
  return busy;
}

TimePoint GetReads::Expire(TimePoint now) {
  TimePoint next = gate_.retry_at(now);
  for (auto it = reads_.begin(); it != reads_.end();) {
    GetWay& way = *it->way;
    if (!way.failure().ok()) {
      End(*it, way.failure().Wrap(way.name()), now);
    } else if (it->deadline <= now) {
      End(*it,
          Status(Code::kDeadlineExceeded, way.name() + ": the read's deadline came after " +
                                              std::to_string(it->read.bytes()) + " bytes"),
          now);
    }
    if (!it->ended.ok() && way.Drained(it->read.gets())) {
      it = Complete(it, it->ended);
      continue;
    }
    if (it->ended.ok()) {
      next = std::min(next, it->deadline);
      if (it->read.poll_at() > now) next = std::min(next, it->read.poll_at());
    } else if (it->drained_by > now) {
      if (!way.ended()) next = std::min(next, it->drained_by);
    } else if (way.close_by() > now) {
      way.End(Status(Code::kPeerUnreachable, "its operations did not end"), now);
      next = now;  // other reads on it end, too
    }
    ++it;
  }
  return next;
}

void GetReads::CompleteAll(const Status& status) {
  for (auto it = reads_.begin(); it != reads_.end();) {
    it = Complete(it, it->ended.ok() ? status : it->ended);
  }
}

GetReads::Use GetReads::UseOf(const GetWay& way) const {
  Use use;
  for (const Op& op : reads_) {
    if (op.way.get() != &way) continue;
    ++use.reads;
    use.in_flight += op.read.gets().in_flight;
  }
  return use;
}

GetReads::Quarantine GetReads::quarantine() const {
  Quarantine quarantine;
  for (const Op& op : reads_) {
    if (op.ended.ok()) continue;
    ++quarantine.reads;
    quarantine.bytes += op.read.bytes();
  }
  return quarantine;
}

void GetReads::End(Op& op, Status status, TimePoint now) {
  if (!op.ended.ok()) return;
  op.ended = std::move(status);
  op.drained_by = now + GetWay::kDrainLimit;
}

GetReads::Ops::iterator GetReads::Complete(Ops::iterator it, Status status) {
  Discharge(*it);
  pads_.Give(it->pad);
  control_.Deliver(std::move(it->done), {.status = std::move(status),
                                         .before = it->read.before(),
                                         .after = it->read.after(),
                                         .bytes = it->read.bytes()});
  return reads_.erase(it);
}

}  // namespace kvrelay::transport
