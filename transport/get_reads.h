// The one-sided reads of a transport, from their start to the moment when nothing writes their
// destination any more.
#pragma once

#include <cstddef>
#include <cstdint>
#include <list>
#include <memory>
#include <span>
#include <vector>

#include "base/clock.h"
#include "base/status.h"
#include "transport/control_side.h"
#include "transport/get_read.h"
#include "transport/get_way.h"
#include "transport/guard_pads.h"
#include "transport/transport.h"
#include "transport/turns.h"

namespace kvrelay::transport {

// Transfer thread only. A read that was cancelled, is late, or has lost its way is in quarantine:
// it posts nothing more and completes once what it had posted is over. When that takes longer than
// kDrainLimit, its way is ended.
class GetReads {
 public:
  static constexpr size_t kMaxReads = 1024;

  struct Order {
    OpId op = 0;
    std::shared_ptr<GetWay> way;
    NextPortion next;
    GuardRef guard;
    Terms terms;
    Done done;
  };
  // Reads that have not completed, and operations of theirs that are in flight.
  struct Use {
    size_t reads = 0;
    uint32_t in_flight = 0;
  };
  struct Quarantine {
    size_t reads = 0;
    uint64_t bytes = 0;
  };

  // `memory`: the registrations of `regions`. One pad per read is taken from `pads`.
  GetReads(std::span<const LocalRegion> regions, std::span<const std::unique_ptr<UcxMemory>> memory,
           GuardPads& pads, const ControlSide& control, std::shared_ptr<Throttle> throttle);

  // Fails at once with kInvalidArgument (a guard that is no record of the peer) or kOverloaded.
  void Start(Order order);
  void Cancel(OpId id, TimePoint now);
  // Lets reads post, in their turns. True when one did something.
  bool Step(TimePoint now);
  // Ends what is late or has lost its way, completes what is drained. Returns when to look again.
  TimePoint Expire(TimePoint now);
  // Once the worker is gone, and with it all that was in flight.
  void CompleteAll(const Status& status);

  Use UseOf(const GetWay& way) const;
  size_t size() const { return reads_.size(); }
  Quarantine quarantine() const;

 private:
  struct Op {
    OpId id = 0;
    TimePoint deadline;
    Turns::Place place;
    Done done;
    std::shared_ptr<GetWay> way;
    std::byte* pad = nullptr;
    GetRead read;
    uint64_t charged = 0;       // bytes that the gate counts as in flight
    Status ended = {};          // not ok: in quarantine, completes with it
    TimePoint drained_by = {};  // else the way is ended
  };
  using Ops = std::list<Op>;

  static void End(Op& op, Status status, TimePoint now);
  // What was posted counts as in flight until nothing of the read is.
  void Discharge(Op& op) {
    const uint64_t bytes = std::exchange(op.charged, 0);
    gate_.End(bytes, bytes);
  }
  Ops::iterator Complete(Ops::iterator it, Status status);

  std::vector<std::byte*> local_bases_;
  std::vector<uint64_t> local_bytes_;
  const std::span<const std::unique_ptr<UcxMemory>> memory_;
  GuardPads& pads_;
  const ControlSide& control_;
  Gate gate_;
  Turns turns_;
  Ops reads_;
};

}  // namespace kvrelay::transport
