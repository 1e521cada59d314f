// A scripted transport for deterministic tests: one thread, virtual time, 8-byte words moved in
// shuffled order with pauses between them, so that whatever a lease's end can do to a copy in
// flight happens.
//
// Behaves worse than the contract demands nowhere, and uses all the room that it leaves: a
// cancelled operation goes on writing until its completion; a dead peer's memory stays readable for
// a while; chunks of packed streams arrive late or never.
#pragma once

#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <set>
#include <string>
#include <vector>

#include "base/clock.h"
#include "transport/transport.h"
#include "transport/turns.h"

namespace kvrelay::transport {

class FakeTransport;

// What connects fake transports: who is at which address, and what goes wrong.
class FakeFabric {
 public:
  struct Script {
    double refuse_connect = 0;  // Connect fails
    double fail = 0;            // an operation fails at a random word
    double stall = 0;           // an operation stops moving until its deadline or Cancel
    double lose_chunk = 0;      // a packed chunk never arrives
    bool in_turn = false;  // a process's reads and sends move as on one thread, a step at a time
    uint32_t words_per_step = 4;                      // at most, between two pauses
    Duration pause = std::chrono::microseconds(200);  // at most
    Duration cancel_delay =
        std::chrono::microseconds(500);   // at most, from Cancel to its completion
    Duration death_notice = Millis(500);  // at most, from Kill to on_death
  };

  // `random` gives uniform 64 bits; it decides everything.
  explicit FakeFabric(std::function<uint64_t()> random) : random_(std::move(random)) {}
  Script script;
  std::function<void(const Terms&)> on_start;  // sees every operation's terms; may be null

  // The process at `address` died: its operations stop, peers hear of it by and by. Its memory must
  // stay allocated for as long as the fabric is used, as a mapping of a dead owner's memory does.
  void Kill(const Address& address);

 private:
  friend class FakeTransport;
  uint64_t Below(uint64_t n) { return n == 0 ? 0 : random_() % n; }
  bool Chance(double p) { return static_cast<double>(random_() >> 11) * 0x1p-53 < p; }
  Duration UpTo(Duration most) { return Duration(static_cast<int64_t>(Below(most.count() + 1))); }

  struct Memory {
    std::vector<LocalRegion> regions;
    Incarnation incarnation = 0;
    bool alive = true;
  };
  std::function<uint64_t()> random_;
  std::map<Address, Memory> memory_;              // stays after death
  std::map<Address, FakeTransport*> transports_;  // alive ones
};

// All calls on the thread that drives `clock`.
class FakeTransport final : public Transport {
 public:
  // Reachable at `address` from now on. `clock` is the process's: after its death no timer of it
  // runs any more.
  FakeTransport(FakeFabric& fabric, Clock& clock, std::string name, Style style, Address address,
                std::vector<LocalRegion> regions, Incarnation incarnation,
                std::shared_ptr<Throttle> throttle = nullptr);
  ~FakeTransport() override;

  std::string_view name() const override { return name_; }
  Style style() const override { return style_; }
  Address LocalAddress() const override { return address_; }
  void Connect(PeerSpec peer, TimePoint deadline, std::function<void(Result<PeerHandle>)> connected,
               std::function<void()> on_death) override;
  void Disconnect(PeerHandle peer) override;
  OpId Read(PeerHandle peer, NextPortion next, GuardRef guard, Terms terms, Done done) override;
  OpId StartPackedReceive(PeerHandle peer, StreamId stream, StreamPlan plan, GuardExpectation want,
                          Terms terms, Done done) override;
  OpId StartPackedSend(PeerSpec reader, StreamId stream, StreamPlan plan, const LeaseRecord* record,
                       GuardExpectation want, Terms terms, Done done) override;
  void Cancel(OpId op) override;

  static constexpr uint64_t kTurnBytes = 64;

  size_t operations() const { return ops_.size(); }

 private:
  friend class FakeFabric;
  struct Word {
    const uint64_t* from = nullptr;
    uint64_t* to = nullptr;
  };
  struct Peer {
    Address address;
    std::function<void()> on_death;
  };
  struct Chunk {
    uint32_t index = 0;
    std::shared_ptr<std::vector<uint64_t>> data;
    GuardWords before;
    GuardWords after;
  };
  struct Op {
    enum class Kind : uint8_t { kRead, kReceive, kSend } kind = Kind::kRead;
    PeerHandle peer = 0;
    Turns::Place place;
    Done done;
    Clock::TimerId deadline = 0;
    Completion completion;
    bool ending = false;  // Cancel or deadline: completes soon
    const LeaseRecord* record = nullptr;
    GuardExpectation want;
    StreamId stream = 0;
    StreamPlan plan;
    Address reader;    // kSend
    NextPortion next;  // kRead
    const std::vector<LocalRegion>* from = nullptr;
    bool last = false;                 // the portion in `words` is the last one
    std::vector<Word> words;           // left to move, taken from the back
    uint64_t fail_after = UINT64_MAX;  // words
    bool stalled = false;
    std::vector<uint32_t> left;  // kSend: chunks to pack
    uint32_t chunk = 0;          // being packed
    std::set<uint32_t> have;     // kReceive: chunks that arrived
    std::shared_ptr<std::vector<uint64_t>> buffer;
    std::vector<Chunk> arrived;  // kReceive: not unpacked yet
    bool unpacking = false;
  };

  OpId Start(Op op, const Terms& terms);
  void Later(Duration most, OpId id, void (FakeTransport::*step)(OpId));
  void StepRead(OpId id);
  void StepPack(OpId id);
  void BeginChunk(OpId id);
  void StepUnpack(OpId id);
  void Arrive(StreamId stream, Chunk chunk);
  // Whether it is the operation's turn to move up to `bytes`.
  bool MayMove(const Op& op, uint64_t bytes);
  // False when the operation stalls or failed instead.
  bool MoveSome(OpId id, Op& op);
  void End(OpId id, Status status);
  void Complete(OpId id, Status status);
  void OnPeerDeath(const Address& address);
  std::vector<Word> Words(const CopyPlan& plan, const std::vector<LocalRegion>& from,
                          const std::vector<LocalRegion>& to);

  FakeFabric& fabric_;
  Clock& clock_;
  const std::string name_;
  const Style style_;
  const Address address_;
  const std::vector<LocalRegion> regions_;
  uint64_t next_ = 1;
  Turns turns_{kTurnBytes};
  Gate gate_;
  std::map<PeerHandle, Peer> peers_;
  std::map<OpId, Op> ops_;
  std::map<StreamId, OpId> receives_;
};

}  // namespace kvrelay::transport
