// Ways to reach another agent's memory. One interface, one contract; a transport knows neither
// messages nor leases: it moves what a plan says and returns the guard words it saw.
//
// Contract
//  - Every started operation completes exactly once (ok, failed, cancelled, deadline); after its
//    completion nothing writes its destination and nothing reads its source. Completions are
//    delivered through the Executor that the transport was created with (the agent's control
//    thread), never from inside the call that started the operation.
//  - Every operation has a deadline; a transport enforces it itself, whatever the peer does
//  (SIGSTOP
//    included).
//  - KV memory is never writable by a peer, and bytes of a packed stream land in the transport's
//  own
//    staging memory, whence the transport unpacks them by plan: cancelling is local and immediate.
//  - Calls come from the control thread. Copies run on the transport's own transfer thread.
//  - The destructor cancels what is in flight, joins its thread and unmaps in bounded time.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "base/clock.h"
#include "base/priority.h"
#include "base/status.h"
#include "kvcache/copy_plan.h"
#include "kvcache/device.h"
#include "kvcache/lease_record.h"
#include "kvcache/region.h"
#include "transport/curve.h"
#include "transport/throttle.h"

namespace kvrelay::transport {

// Runs closures on the control thread, in order. Callable from any thread; outlives the transport.
using Executor = std::function<void(std::function<void()>)>;

// One registered region of this process. The memory outlives the transport.
struct LocalRegion {
  std::byte* data = nullptr;
  uint64_t bytes = 0;
  int export_fd = -1;  // of the same memory; -1 when others cannot map it
  DeviceKind device = DeviceKind::kCpu;

  static LocalRegion Of(const Region& region) {
    return {region.data(), region.bytes(), region.export_fd(), region.place().kind};
  }
};

// How to reach a process's regions by one transport; made by LocalAddress(), carried in META,
// opaque to everybody else.
using Address = std::string;

struct PeerSpec {
  std::string name;  // for messages: "prefill 127.0.0.1:7601 rank 1"
  Address address;
  std::vector<uint64_t> region_bytes;  // of its regions, by RegionId
  Incarnation incarnation = 0;
};

using PeerHandle = uint64_t;  // 0 is never a peer
using OpId = uint64_t;        // 0 is never an operation
using StreamId = uint64_t;    // chosen by the reader; unique per reader process for ever

// Where a guard's record lies in the owner's registered memory.
struct GuardRef {
  RegionId region = 0;
  uint64_t offset = 0;  // bytes, multiple of 64
};

// kInvalidArgument when it is not a record of the peer's regions.
Status CheckGuard(const GuardRef& guard, std::span<const uint64_t> peer_region_bytes);

struct Completion {
  Status status;
  GuardWords before;   // guard read before the last portion (packed: before the first chunk; each
                       // chunk's is checked)
  GuardWords after;    // guard read after all data (packed: after the last chunk)
  uint64_t bytes = 0;  // payload bytes moved
};
using Done = std::function<void(Completion)>;

// On what terms an operation runs.
struct Terms {
  Terms() = default;
  // NOLINTNEXTLINE(google-explicit-constructor): most operations have nothing but a deadline.
  Terms(TimePoint by, Priority how_urgent = Priority::kDecode, uint64_t whose = 0)
      : deadline(by), priority(how_urgent), session(whose) {}

  TimePoint deadline;
  // Of what waits for the same thread the most urgent goes first, piece by piece.
  Priority priority = Priority::kDecode;
  // Sessions of one priority move in turns of as many bytes; all operations of one have one turn
  // together. 0: a session of its own. See turns.h.
  uint64_t session = 0;
};

// Part of what a one-sided read moves.
struct Portion {
  CopyPlan plan;     // perhaps empty: nothing may be read yet
  bool last = true;  // nothing comes after it
};
// What a one-sided read moves, portion by portion: called with the guard words just read, says what
// may be read under them and was not said before. An error ends the read with it. On the transfer
// thread, one call at a time.
using NextPortion = std::function<Result<Portion>(const GuardWords& before)>;
// All of `plan`, whatever the guard says.
NextPortion Whole(CopyPlan plan);

// A packed stream's chunks, both sides. The functions are pure and are called on the transfer
// thread.
struct StreamPlan {
  uint32_t chunks = 0;
  uint64_t max_chunk_bytes = 0;
  std::function<Result<CopyPlan>(uint32_t chunk)> plan_chunk;
  // What must be computed before a chunk can be packed; null: what the guard is expected to cover.
  std::function<KvExtent(uint32_t chunk)> extent_of = {};

  // The guard as it must be around one chunk.
  GuardExpectation Want(GuardExpectation whole, uint32_t chunk) const {
    if (extent_of) whole.extent = extent_of(chunk);
    return whole;
  }
};

// How long to wait before one looks again whether a prompt's computation has advanced, when it last
// did `since` ago: short against the time that a step of it takes.
Duration PollPause(Duration since);

// Bytes that are copied in less time than it takes to wake another thread.
inline constexpr uint64_t kSmallRead = 64 << 10;

enum class Style : uint8_t { kOneSided, kPacked };

// How well a transport moves a plan.
struct Fitness {
  enum class Fit : uint8_t { kNo, kPoor, kGood };
  Fit fit = Fit::kGood;
  std::string why;  // unless kGood
};

// What a transport counts, by name, for people to look at.
using Counters = std::vector<std::pair<std::string_view, uint64_t>>;

// A read that whoever began it looks after, see Transport::Begin. One thread at a time. The
// destructor waits until nothing writes the destination any more: the time of a copy.
class BegunRead {
 public:
  virtual ~BegunRead() = default;
  // How it completed; nothing while it is under way. Not again after that.
  virtual std::optional<Completion> Look() = 0;
};

class Transport {
 public:
  virtual ~Transport() = default;

  virtual std::string_view name() const = 0;  // "mapped", "ucx-get", "ucx-packed", "zmq-packed"
  virtual Style style() const = 0;
  // How peers reach this process's regions.
  virtual Address LocalAddress() const = 0;
  // What operations go through, for people: "cma"; empty when the name says it.
  virtual std::string lanes() const { return {}; }
  // kPoor: another transport, if there is one, does it faster. kNo: an operation with it fails.
  virtual Fitness FitnessFor(const CopyPlan&) const { return {}; }
  // Whether it moves every plan well; if not, a peer is reached by another transport as well.
  virtual bool moves_any_plan() const { return true; }
  // Whether an operation that was cancelled may take its time to complete, because what is in
  // flight cannot be recalled.
  virtual bool lingers() const { return false; }
  // Any thread.
  virtual Counters counters() const { return {}; }

  // Opens the way to one incarnation of a peer: one callback, by the deadline. When it succeeds the
  // way was really used: regions are mapped (kOneSided), or a message went there and back
  // (kPacked); a failure's message is the reason that `inspect` shows for the path not taken.
  // `on_death` fires at most once, on the control thread, when the peer's process is seen to have
  // died or the connection to it is lost; operations on it have failed by then, and mappings are
  // gone. It does not fire after Disconnect.
  virtual void Connect(PeerSpec peer, TimePoint deadline,
                       std::function<void(Result<PeerHandle>)> connected,
                       std::function<void()> on_death) = 0;
  // Operations in flight are cancelled first. Unknown handles are ignored.
  virtual void Disconnect(PeerHandle peer) = 0;

  // kOneSided. Guard, data of the portion that it allows (peer regions -> local regions), and so on
  // until the last portion, then guard again. Looks at the guard from time to time while there is
  // nothing to read.
  virtual OpId Read(PeerHandle peer, NextPortion next, GuardRef guard, Terms terms, Done done) = 0;

  // kOneSided. The same of a small plan, done on the calling thread when it returns: any thread, at
  // once, without the hops to the transport's thread and back. Nothing when this transport cannot,
  // what moves is bounded, the plan reads more than kSmallRead, or the peer is not connected (any
  // more): use Read.
  virtual std::optional<Completion> ReadNow(PeerHandle, const CopyPlan&, const GuardRef&) {
    return std::nullopt;
  }

  // kOneSided. The same of a plan of any size whose bytes a device moves, which is at it when this
  // returns; any thread. Null when this transport has no device, what moves is bounded, the peer is
  // not connected (any more), or the guard is not as wanted yet: use Read. Its peer's memory stays
  // as long as the read.
  virtual std::unique_ptr<BegunRead> Begin(PeerHandle, const CopyPlan&, const GuardRef&,
                                           const GuardExpectation&) {
    return nullptr;
  }
  // Whether Begin may.
  virtual bool begins() const { return false; }

  // kPacked, reader: expects `stream` and unpacks its chunks, in the order in which they come, into
  // local regions (src region 0 = the chunk). Start it before the owner is asked to send. A chunk
  // whose guard words do not satisfy `want` fails the operation with kStaleRead and is not
  // unpacked; so does one that came before or is of the wrong length (kInternal). An owner that
  // stops the stream early fails it too.
  virtual OpId StartPackedReceive(PeerHandle peer, StreamId stream, StreamPlan plan,
                                  GuardExpectation want, Terms terms, Done done) = 0;
  // kPacked, owner: for each chunk reads the guard, packs (local regions -> dst region 0 = a
  // registered ring slot), reads the guard again, and sends both with the chunk to the reader's
  // address. A chunk whose extent is not computed yet waits, and others go first. Stops at the
  // first chunk whose guard does not hold. A send completion is not delivery.
  virtual OpId StartPackedSend(PeerSpec reader, StreamId stream, StreamPlan plan,
                               const LeaseRecord* record, GuardExpectation want, Terms terms,
                               Done done) = 0;

  // Completes the operation with kCancelled soon, unless it completed already. Unknown ids are
  // ignored.
  virtual void Cancel(OpId op) = 0;
};

// The largest chunk of a packed stream that is sent. One that stays in the cache between the
// network and its unpacking moves up to twice as fast as one of a megabyte.
inline constexpr uint64_t kDefaultChunkBytes = 256 << 10;

// Settings that all transports share.
struct Options {
  std::vector<LocalRegion> regions;  // by RegionId
  // Where the regions are a GPU's: it carries out what is read into them, and packs and unpacks
  // chunks. Null: all are the host's.
  std::shared_ptr<Device> device;
  Executor executor;
  std::string run_dir;  // folder for Unix sockets, mode 0700
  std::string host_id;  // processes whose ids differ do not share memory; empty: the kernel's
  std::string data_interface;  // of UCX's TCP and of ZeroMQ; empty: loopback
  // For zmq-packed: who we are and whom we talk to. Null: a key pair of this transport's own, told
  // to peers in the address, with which anybody may connect; what is sent is secret even so.
  std::shared_ptr<const CurveIdentity> curve;
  Duration spin = std::chrono::microseconds(50);
  uint64_t chunk_bytes = kDefaultChunkBytes;
  // Of peers' memory that `mapped` keeps mapped, least recently read out first, unless it is being
  // read; 0: all of it.
  uint64_t max_mapped_bytes = 0;
  // Connections and threads that a packed stream is dealt over, see striped.h; 0: by the number of
  // processors.
  uint32_t rails = 0;
  std::shared_ptr<Throttle> throttle;  // of what this process moves; null: nothing is bounded
  Incarnation incarnation = 0;         // of this process
};

// Each refuses with a reason when this host cannot do it.
Result<std::unique_ptr<Transport>> CreateMapped(Options options);
Result<std::unique_ptr<Transport>> CreateUcxGet(Options options);
Result<std::unique_ptr<Transport>> CreateUcxPacked(Options options);
Result<std::unique_ptr<Transport>> CreateZmqPacked(Options options);

struct TransportKind {
  std::string_view name;
  Result<std::unique_ptr<Transport>> (*create)(Options options) = nullptr;
  // Listens on the data network for anybody who reaches it.
  bool open_ports = false;
  // Moves from and to GPUs' memory as well.
  bool devices = false;
  // Encrypts, which costs most of the speed: chosen by itself only where there are keys.
  bool encrypts = false;
};
// All that this build has, in the order in which they are preferred.
std::span<const TransportKind> TransportKinds();

}  // namespace kvrelay::transport
