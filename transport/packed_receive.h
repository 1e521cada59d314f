// The reader's side of packed streams: checks what arrives and unpacks it into our regions.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <list>
#include <memory>
#include <span>
#include <string>
#include <unordered_map>
#include <vector>

#include "kvcache/device.h"
#include "transport/packed_wire.h"
#include "transport/slot_ring.h"
#include "transport/transport.h"

namespace kvrelay::transport {

// Transfer thread only. Knows no network: whatever brings messages calls OnMessage, in the order in
// which the owner sent them, with data in staging memory that nobody writes during the call. So an
// operation that has completed is out of reach of anything that arrives later. A device unpacks
// from staging memory of ours, which it reaches; whatever ends an operation waits for what it
// unpacks.
class PackedReceiver {
 public:
  static constexpr size_t kMaxStreams = 4096;
  using Deliver = std::function<void(Done, Completion)>;

  struct Expected {
    OpId op = 0;
    PeerHandle peer = 0;
    std::string peer_name;  // for messages
    Incarnation incarnation = 0;
    StreamId stream = 0;
    StreamPlan plan;
    GuardExpectation want;
    TimePoint deadline;
    Done done;
  };

  // `device`: that has the regions' KV and reaches the ring, outlives the receiver. Null, as the
  // ring: the host.
  PackedReceiver(std::span<const LocalRegion> regions, Device* device,
                 std::unique_ptr<SlotRing> ring, Deliver deliver);

  // Fails at once with kInvalidArgument (no chunks, or a stream id in use) or kOverloaded (more
  // than kMaxStreams).
  void Start(Expected expected);
  void Cancel(OpId op);
  void FailPeer(PeerHandle peer, const Status& status);
  void FailAll(const Status& status);
  // Fails what is past its deadline and returns the next one, or TimePoint::max().
  TimePoint Expire(TimePoint now);

  // A chunk, or the word that a stream stops. What belongs to no stream (late chunks of cancelled
  // ones) is dropped and counted.
  void OnMessage(const PackedHeader& header, std::span<const std::byte> data);
  // Completes what a device has unpacked. True while it is at it.
  bool LookAtUnpacking();

  bool Expects(StreamId stream) const { return streams_.contains(stream); }
  size_t streams() const { return streams_.size(); }
  uint64_t dropped() const { return dropped_; }

 private:
  struct Stream {
    Expected expected;
    std::vector<bool> have;  // by chunk
    uint32_t arrived = 0;
    uint32_t unpacking = 0;  // by a device
    Completion completion;
  };
  using Streams = std::unordered_map<StreamId, Stream>;
  // A chunk that a device unpacks.
  struct Unpacking {
    StreamId stream = 0;
    uint64_t bytes = 0;
    Slot* slot = nullptr;
    std::unique_ptr<DeviceCopy> copy;
  };

  // Unpacks the chunk, if it is one that is still due, or has the device begin to: with a device a
  // slot is free.
  Status Take(Stream& stream, const PackedHeader& header, std::span<const std::byte> data);
  Status Unpack(Stream& stream, const CopyPlan& plan, std::span<const std::byte> data);
  // Completes the stream when all of it is here.
  void OnUnpacked(Streams::iterator it, const Status& status);
  Streams::iterator Complete(Streams::iterator it, Status status);

  const Deliver deliver_;
  Device* const device_;
  const std::unique_ptr<SlotRing> ring_;
  std::vector<std::byte*> local_bases_;
  std::vector<uint64_t> local_bytes_;
  Streams streams_;
  std::list<Unpacking> unpacking_;  // goes before the ring
  uint64_t dropped_ = 0;
};

}  // namespace kvrelay::transport
