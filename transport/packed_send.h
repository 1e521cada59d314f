// The owner's side of packed streams: packs chunks between two reads of the guard and sends them.
#pragma once

#include <cstddef>
#include <cstdint>
#include <deque>
#include <functional>
#include <list>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "kvcache/device.h"
#include "transport/packed_lanes.h"
#include "transport/slot_ring.h"
#include "transport/transport.h"
#include "transport/turns.h"

namespace kvrelay::transport {

// Transfer thread only. Outlives every send in flight: destroy it after the carrier. What it packs
// when it ends is waited for.
class PackedSender {
 public:
  static constexpr size_t kMaxStreams = 4096;
  using Deliver = std::function<void(Done, Completion)>;

  struct Outgoing {
    OpId op = 0;
    std::string reader_name;  // for messages
    std::shared_ptr<PackedLane> lane;
    StreamId stream = 0;
    StreamPlan plan;
    const LeaseRecord* record = nullptr;
    GuardExpectation want;
    Terms terms;
    Done done;
  };

  // `device`: that has the regions' KV and reaches the ring, outlives the sender; null: the host.
  PackedSender(std::span<const LocalRegion> regions, Device* device, Incarnation incarnation,
               std::unique_ptr<SlotRing> ring, PackedLanes& lanes,
               std::shared_ptr<Throttle> throttle, Deliver deliver);

  // Fails at once with kInvalidArgument (no chunks, or too large ones) or kOverloaded (more than
  // kMaxStreams).
  void Start(Outgoing outgoing);
  void Cancel(OpId op);
  void FailAll(const Status& status);

  // Packs and sends what there is room for, about a megabyte a call, chunk by chunk in turn. True
  // when it did something, or a device is at it.
  bool Pump(TimePoint now);
  // Fails what is past its deadline or has lost its lane, and closes lanes whose readers take
  // nothing while they hold slots that others need. Returns when to look again.
  TimePoint Expire(TimePoint now);

  size_t streams() const { return streams_.size(); }
  size_t slots_in_use() const { return ring_->size() - ring_->free(); }

 private:
  struct Stream {
    Outgoing out;
    Turns::Place place;
    std::deque<uint32_t> left;  // chunks to be packed, in order of need
    uint32_t sent = 0;
    uint32_t packing = 0;  // by a device
    uint32_t in_flight = 0;
    TimePoint last_ready;  // when a chunk could last be packed
    TimePoint poll_at;     // none can before
    bool failed = false;   // to be ended by Expire: a send failed inside a callback
    Completion completion;
  };
  using Streams = std::list<std::shared_ptr<Stream>>;
  // A chunk that a device packs.
  struct Packing {
    std::shared_ptr<Stream> stream;
    Slot* slot = nullptr;
    std::unique_ptr<DeviceCopy> copy;
  };

  // Whether a chunk of it could be sent, if one is computed.
  bool MaySend(const Stream& stream, TimePoint now) const;
  enum class Next : uint8_t { kDid, kNotComputed, kMustWait };
  Next SendNext(const std::shared_ptr<Stream>& stream, TimePoint now);
  // The first chunk left whose KV is computed, as an index into `left`; nullopt: none is.
  // kStaleRead when the lease has ended.
  Result<std::optional<size_t>> FindReady(Stream& stream, TimePoint now);
  // Reads the guard and packs the chunk into the slot, or has the device begin to.
  Result<std::unique_ptr<DeviceCopy>> BeginPacking(Stream& stream, uint32_t chunk, Slot& slot);
  // It is packed, or could not be: reads the guard again and sends it.
  void EndPacking(const std::shared_ptr<Stream>& stream, Slot* slot, Status packed, TimePoint now);
  // Sends what the device has packed.
  void LookAtPacking(TimePoint now);
  // Waits for what the device packs of a stream, and gives it up.
  void DropPacking(const Stream& stream);
  // The gate has let its bytes begin.
  void Submit(const std::shared_ptr<Stream>& stream, Slot* slot, TimePoint now);
  // Tells the reader, if there is room to, and completes.
  void Stop(const std::shared_ptr<Stream>& stream, Status status, TimePoint now);
  void Complete(const std::shared_ptr<Stream>& stream, Status status);

  const Deliver deliver_;
  Device* const device_;
  const Incarnation incarnation_;
  std::vector<const std::byte*> local_bases_;
  std::vector<uint64_t> local_bytes_;
  const std::unique_ptr<SlotRing> ring_;
  PackedLanes& lanes_;
  Turns turns_;
  Gate gate_;
  Streams streams_;
  std::list<Packing> packing_;  // goes before the ring
};

}  // namespace kvrelay::transport
