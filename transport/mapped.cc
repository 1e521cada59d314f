// The `mapped` transport: peers on this host are read through read-only mappings of their
// registered memory.
#include <glog/logging.h>

#include <algorithm>
#include <chrono>
#include <list>
#include <map>
#include <memory>
#include <mutex>
#include <shared_mutex>
#include <string>
#include <utility>
#include <vector>

#include "base/parallel.h"
#include "kvcache/copy_host.h"
#include "transport/control_side.h"
#include "transport/mapped_address.h"
#include "transport/mapped_begun.h"
#include "transport/mapped_listener.h"
#include "transport/mapped_peer.h"
#include "transport/mapped_read.h"
#include "transport/mapped_wire.h"
#include "transport/mapper.h"
#include "transport/transfer_thread.h"
#include "transport/transport.h"
#include "transport/turns.h"

namespace kvrelay::transport {
namespace {

constexpr size_t kMaxReads = 4096;

class MappedTransport final : public Transport, private TransferThread::Worker {
 public:
  static Result<std::unique_ptr<Transport>> Create(Options options);
  ~MappedTransport() override {
    if (thread_) thread_->Stop();
  }

  std::string_view name() const override { return "mapped"; }
  Style style() const override { return Style::kOneSided; }
  Address LocalAddress() const override { return address_; }

  void Connect(PeerSpec spec, TimePoint deadline, std::function<void(Result<PeerHandle>)> connected,
               std::function<void()> on_death) override;
  void Disconnect(PeerHandle handle) override;
  OpId Read(PeerHandle peer, NextPortion next, GuardRef guard, Terms terms, Done done) override;
  std::optional<Completion> ReadNow(PeerHandle peer, const CopyPlan& plan,
                                    const GuardRef& guard) override;
  std::unique_ptr<BegunRead> Begin(PeerHandle peer, const CopyPlan& plan, const GuardRef& guard,
                                   const GuardExpectation& want) override;
  bool begins() const override { return options_.device != nullptr && !gate_.bounded(); }
  OpId StartPackedReceive(PeerHandle, StreamId, StreamPlan, GuardExpectation, Terms,
                          Done done) override {
    return RefusePacked(std::move(done));
  }
  OpId StartPackedSend(PeerSpec, StreamId, StreamPlan, const LeaseRecord*, GuardExpectation, Terms,
                       Done done) override {
    return RefusePacked(std::move(done));
  }
  void Cancel(OpId op) override;

 private:
  struct Peer {
    std::unique_ptr<MappedPeer> way;
    TimePoint deadline;  // of connecting
    bool connecting = true;
    bool over = false;  // failed or dead: to be removed
  };
  struct ReadOp {
    OpId id = 0;
    PeerHandle peer = 0;
    TimePoint deadline;
    Turns::Place place;
    Done done;
    MappedRead read;
  };

  explicit MappedTransport(Options options)
      : options_(std::move(options)),
        control_(options_.executor),
        gate_(options_.throttle),
        piece_bytes_(gate_.PieceBytes(MappedRead::kStepBytes)),
        turns_(piece_bytes_) {
    for (const LocalRegion& region : options_.regions) {
      local_bases_.push_back(region.data);
      local_bytes_.push_back(region.bytes);
    }
  }

  // Any thread. Null unless the peer is ready.
  std::shared_ptr<const MappedMemory> NearMemory(PeerHandle peer) const;
  Status Check(const CopyPlan& plan, const GuardRef& guard, const MappedMemory& peer) const;

  // Transfer thread.
  TimePoint Work(TimePoint now) override;
  void Finish() override;
  void OnPeerState(PeerHandle handle, Status status);
  void SetNear(PeerHandle handle, std::shared_ptr<const MappedMemory> memory);
  // While more is mapped than may be, lets go of what was read the longest time ago, but not of
  // what is being read.
  void MakeRoomFor(PeerHandle newest);
  bool IsRead(PeerHandle peer) const;
  void StartRead(OpId id, PeerHandle handle, NextPortion next, GuardRef guard, const Terms& terms,
                 Done done);
  // True when a device is at work: its end is waited for awake.
  bool LookAtCopies();
  // Does a step of the read whose turn it is; false when none has anything to do, or may.
  bool StepRead(TimePoint now);
  // Of a read that keeps no other waiting: as long a step on all threads as one thread's.
  uint64_t LonePieceBytes() const {
    return gate_.PieceBytes(MappedRead::kStepBytes * static_cast<uint64_t>(Parallelism()));
  }
  // While nobody reads: maps some more of a new peer's pages. False when nothing is left.
  bool PopulatePeer();
  TimePoint ExpireReads(TimePoint now);
  TimePoint ExpirePeers(TimePoint now);
  void FailReadsOf(PeerHandle peer, const Status& status);
  void Complete(ReadOp op, Status status);

  // Control thread.
  OpId RefusePacked(Done done) {
    return control_.RefuseStart(
        std::move(done), Status(Code::kInvalidArgument, "mapped is one-sided: it has no streams"));
  }

  const Options options_;
  ControlSide control_;
  Gate gate_;  // bounded() by any thread, else the transfer thread's
  const uint64_t piece_bytes_;
  std::vector<std::byte*> local_bases_;
  std::vector<uint64_t> local_bytes_;
  HostIdentity self_;
  Address address_;

  // Any thread.
  mutable std::shared_mutex near_mutex_;
  std::map<PeerHandle, std::shared_ptr<const MappedMemory>>
      near_;  // of ready peers; under the mutex

  // Transfer thread.
  std::unique_ptr<MappedListener> listener_;
  std::map<PeerHandle, Peer> peers_;
  Turns turns_;
  std::list<ReadOp> reads_;

  std::unique_ptr<TransferThread> thread_;
  std::unique_ptr<Mapper> mapper_;  // goes before the thread
};

Result<std::unique_ptr<Transport>> MappedTransport::Create(Options options) {
  if (options.regions.empty() || options.regions.size() > mapped::kMaxRegions) {
    return Error(Code::kInvalidArgument,
                 "mapped serves 1 to " + std::to_string(mapped::kMaxRegions) + " regions, not " +
                     std::to_string(options.regions.size()));
  }
  for (size_t i = 0; i < options.regions.size(); ++i) {
    if (options.regions[i].export_fd < 0) {
      return Error(Code::kRefused,
                   "region " + std::to_string(i) + " cannot be mapped by other processes");
    }
  }
  std::unique_ptr<MappedTransport> transport(new MappedTransport(std::move(options)));
  const Options& own = transport->options_;
  KVRELAY_ASSIGN_OR_RETURN(transport->self_, ThisHost(own.host_id));
  KVRELAY_ASSIGN_OR_RETURN(transport->thread_, TransferThread::Create("kvr-mapped", own.spin));
  KVRELAY_ASSIGN_OR_RETURN(transport->mapper_,
                           Mapper::Create(*transport->thread_, own.device.get()));
  KVRELAY_ASSIGN_OR_RETURN(transport->listener_,
                           MappedListener::Create(transport->thread_->loop(), own.run_dir,
                                                  own.regions, own.incarnation));
  KVRELAY_RETURN_IF_ERROR(transport->listener_->Start());
  transport->address_ = MappedAddress{.host = transport->self_,
                                      .nonce = transport->listener_->nonce(),
                                      .socket_path = transport->listener_->socket_path()}
                            .Encode();
  transport->thread_->Start(*transport);
  return transport;
}

// --- Control thread

void MappedTransport::Connect(PeerSpec spec, TimePoint deadline,
                              std::function<void(Result<PeerHandle>)> connected,
                              std::function<void()> on_death) {
  const PeerHandle handle = control_.Watch(std::move(connected), std::move(on_death));
  thread_->Post([this, handle, deadline, spec = std::move(spec)]() mutable {
    Peer& peer = peers_[handle];
    peer.deadline = deadline;
    peer.way = std::make_unique<MappedPeer>(
        thread_->loop(), std::move(spec), self_, *mapper_,
        [this, handle](Status status) { OnPeerState(handle, std::move(status)); });
    peer.way->Retry();
  });
}

void MappedTransport::Disconnect(PeerHandle handle) {
  control_.Forget(handle);
  thread_->Post([this, handle] {
    SetNear(handle, nullptr);
    FailReadsOf(handle, Status(Code::kCancelled, "disconnected"));
    peers_.erase(handle);
  });
}

OpId MappedTransport::Read(PeerHandle peer, NextPortion next, GuardRef guard, Terms terms,
                           Done done) {
  const OpId id = control_.NextId();
  thread_->Post(
      [this, id, peer, guard, terms, next = std::move(next), done = std::move(done)]() mutable {
        StartRead(id, peer, std::move(next), guard, terms, std::move(done));
      });
  return id;
}

std::optional<Completion> MappedTransport::ReadNow(PeerHandle peer, const CopyPlan& plan,
                                                   const GuardRef& guard) {
  if (plan.src_bytes() > kSmallRead || gate_.bounded() || options_.device) return std::nullopt;
  const std::shared_ptr<const MappedMemory> memory = NearMemory(peer);
  if (memory == nullptr) return std::nullopt;
  Completion completion;
  completion.status = Check(plan, guard, *memory);
  if (!completion.status.ok()) return completion;
  const LeaseRecord& record = memory->record(guard);
  completion.before = record.ReadBefore();
  ExecuteCopy(plan, memory->bases, local_bases_);
  completion.after = record.ReadAfter();
  completion.bytes = plan.bytes();
  return completion;
}

std::unique_ptr<BegunRead> MappedTransport::Begin(PeerHandle peer, const CopyPlan& plan,
                                                  const GuardRef& guard,
                                                  const GuardExpectation& want) {
  if (!begins()) return nullptr;
  std::shared_ptr<const MappedMemory> memory = NearMemory(peer);
  if (memory == nullptr || !Check(plan, guard, *memory).ok()) return nullptr;
  return MappedBegun::Begin(options_.device, std::move(memory), plan, local_bases_, guard, want);
}

std::shared_ptr<const MappedMemory> MappedTransport::NearMemory(PeerHandle peer) const {
  const std::shared_lock lock(near_mutex_);
  const auto it = near_.find(peer);
  if (it == near_.end()) return nullptr;
  it->second->last_used.store(EventLoop::Now(), std::memory_order_relaxed);
  return it->second;
}

Status MappedTransport::Check(const CopyPlan& plan, const GuardRef& guard,
                              const MappedMemory& peer) const {
  KVRELAY_RETURN_IF_ERROR(CheckGuard(guard, peer.bytes));
  return plan.Validate(peer.bytes, local_bytes_);
}

void MappedTransport::Cancel(OpId op) {
  thread_->Post([this, op] {
    for (auto it = reads_.begin(); it != reads_.end(); ++it) {
      if (it->id != op) continue;
      ReadOp cancelled = std::move(*it);
      reads_.erase(it);
      return Complete(std::move(cancelled), Status(Code::kCancelled, "cancelled"));
    }
  });
}

// --- Transfer thread

TimePoint MappedTransport::Work(TimePoint now) {
  TimePoint next = listener_->Expire(now);
  next = std::min(next, ExpirePeers(now));
  const bool copying = LookAtCopies();
  const bool busy = StepRead(now) || copying || PopulatePeer();
  next = std::min({next, ExpireReads(now), gate_.retry_at(now)});
  return busy ? kBusy : next;
}

void MappedTransport::Finish() {
  const Status status(Code::kCancelled, "the transport is closing");
  while (!reads_.empty()) {
    ReadOp op = std::move(reads_.front());
    reads_.pop_front();
    Complete(std::move(op), status);
  }
  for (auto& [handle, peer] : peers_) {
    if (peer.connecting) OnPeerState(handle, status);
  }
  {
    const std::unique_lock lock(near_mutex_);
    near_.clear();
  }
  peers_.clear();
  listener_.reset();
}

void MappedTransport::OnPeerState(PeerHandle handle, Status status) {
  Peer& peer = peers_.at(handle);
  const bool connecting = std::exchange(peer.connecting, false);
  if (status.ok()) {
    SetNear(handle, peer.way->memory());
    NearMemory(handle);  // the newest is not what was read the longest time ago
    MakeRoomFor(handle);
    return control_.Connected(handle);
  }
  peer.over = true;
  if (!connecting) {
    SetNear(handle, nullptr);
    LOG(INFO) << "mapped: " << peer.way->spec().name << ": " << status.message() << "; unmapped";
    FailReadsOf(handle, status.Wrap(peer.way->spec().name));
  }
  control_.Lost(handle, std::move(status));
}

void MappedTransport::SetNear(PeerHandle handle, std::shared_ptr<const MappedMemory> memory) {
  {
    const std::unique_lock lock(near_mutex_);
    std::shared_ptr<const MappedMemory>& near = near_[handle];
    near.swap(memory);
    if (near == nullptr) near_.erase(handle);
  }
  mapper_->Drop(std::move(memory));
}

void MappedTransport::MakeRoomFor(PeerHandle newest) {
  if (options_.max_mapped_bytes == 0) return;
  const auto mapped = [](const Peer& peer) {
    return peer.over || !peer.way->ready() ? 0 : peer.way->memory()->all_bytes();
  };
  const auto last_used = [](const Peer& peer) {
    return peer.way->memory()->last_used.load(std::memory_order_relaxed);
  };
  uint64_t bytes = 0;
  for (const auto& [handle, peer] : peers_) bytes += mapped(peer);
  while (bytes > options_.max_mapped_bytes) {
    auto oldest = peers_.end();
    for (auto it = peers_.begin(); it != peers_.end(); ++it) {
      if (it->first == newest || mapped(it->second) == 0 || IsRead(it->first)) continue;
      if (oldest == peers_.end() || last_used(it->second) < last_used(oldest->second)) oldest = it;
    }
    if (oldest == peers_.end()) return;
    bytes -= mapped(oldest->second);
    OnPeerState(oldest->first, Status(Code::kOverloaded,
                                      "not read for the longest time, and more is mapped than " +
                                          std::to_string(options_.max_mapped_bytes) + " bytes"));
  }
}

bool MappedTransport::IsRead(PeerHandle peer) const {
  return std::ranges::any_of(reads_, [peer](const ReadOp& op) { return op.peer == peer; });
}

void MappedTransport::StartRead(OpId id, PeerHandle handle, NextPortion next, GuardRef guard,
                                const Terms& terms, Done done) {
  const auto it = peers_.find(handle);
  if (it == peers_.end() || !it->second.way->ready()) {
    return control_.Refuse(std::move(done),
                           Status(Code::kPeerUnreachable, "the peer is not connected any more"));
  }
  if (reads_.size() >= kMaxReads) {
    return control_.Refuse(
        std::move(done),
        Status(Code::kOverloaded, std::to_string(kMaxReads) + " reads are in flight already"));
  }
  NearMemory(handle);  // was used now
  const PeerSpec& spec = it->second.way->spec();
  if (Status status = CheckGuard(guard, spec.region_bytes); !status.ok()) {
    return control_.Refuse(std::move(done), status.Wrap(spec.name));
  }
  reads_.push_back({.id = id,
                    .peer = handle,
                    .deadline = terms.deadline,
                    .place = turns_.Enter(terms),
                    .done = std::move(done),
                    .read = MappedRead(std::move(next), guard)});
}

bool MappedTransport::LookAtCopies() {
  bool any = false;
  for (ReadOp& op : reads_) {
    const uint64_t piece = op.read.copying_bytes();
    if (piece == 0) continue;
    if (op.read.LookAtCopy()) {
      gate_.End(piece, piece);
    } else {
      any = true;
    }
  }
  return any;
}

bool MappedTransport::StepRead(TimePoint now) {
  const auto may = [&](const ReadOp& op) {
    return op.read.copying_bytes() == 0 && op.read.poll_at() <= now;
  };
  for (auto it = NextInTurn(reads_, may); it != reads_.end(); it = NextInTurn(reads_, may)) {
    const MappedPeer& way = *peers_.at(it->peer).way;
    const MappedRead::Memory memory{way.memory(), local_bases_, local_bytes_,
                                    options_.device.get()};
    MappedRead::State state = it->read.Prepare(memory, now);
    if (state == MappedRead::State::kWaiting) continue;
    if (state == MappedRead::State::kReady) {
      const uint64_t most = reads_.size() > 1 ? piece_bytes_ : LonePieceBytes();
      const uint64_t piece = it->read.PieceBytes(memory, most);
      if (!gate_.Begin(it->place.priority(), piece, now)) return false;
      const uint64_t moved = it->read.Move(memory, piece);
      const uint64_t copying = it->read.copying_bytes();
      gate_.End(piece - copying, moved);
      turns_.Moved(it->place, moved + copying);
      if (copying == 0) state = it->read.Prepare(memory, now);
    }
    if (state == MappedRead::State::kReady || state == MappedRead::State::kWaiting) return true;
    ReadOp ended = std::move(*it);
    reads_.erase(it);
    Status status = ended.read.failure();
    if (!status.ok()) status = status.Wrap(way.spec().name);
    Complete(std::move(ended), std::move(status));
    return true;
  }
  return false;
}

bool MappedTransport::PopulatePeer() {
  return std::ranges::any_of(peers_, [](auto& peer) { return peer.second.way->PopulateNext(); });
}

TimePoint MappedTransport::ExpireReads(TimePoint now) {
  TimePoint next = TimePoint::max();
  for (auto it = reads_.begin(); it != reads_.end();) {
    const auto current = it++;
    if (current->deadline > now) {
      next = std::min(next, current->deadline);
      if (current->read.poll_at() > now) next = std::min(next, current->read.poll_at());
      continue;
    }
    ReadOp late = std::move(*current);
    reads_.erase(current);
    const std::string& name = peers_.at(late.peer).way->spec().name;
    Status status(Code::kDeadlineExceeded, name + ": the read's deadline came after " +
                                               std::to_string(late.read.bytes()) + " bytes");
    Complete(std::move(late), std::move(status));
  }
  return next;
}

TimePoint MappedTransport::ExpirePeers(TimePoint now) {
  TimePoint next = TimePoint::max();
  for (auto& [handle, peer] : peers_) {
    if (!peer.over && peer.way->retry_at() <= now) peer.way->Retry();
    if (!peer.over && peer.connecting && peer.deadline <= now) {
      OnPeerState(handle, Status(Code::kDeadlineExceeded,
                                 peer.way->mapping()
                                     ? "its memory was not mapped before the deadline"
                                     : "the owner's socket gave no regions before the deadline"));
    }
    if (peer.over || !peer.connecting) continue;
    next = std::min({next, peer.deadline, peer.way->retry_at()});
  }
  std::erase_if(peers_, [](const auto& entry) { return entry.second.over; });
  return next;
}

void MappedTransport::FailReadsOf(PeerHandle peer, const Status& status) {
  for (auto it = reads_.begin(); it != reads_.end();) {
    const auto current = it++;
    if (current->peer != peer) continue;
    ReadOp failed = std::move(*current);
    reads_.erase(current);
    Complete(std::move(failed), status);
  }
}

void MappedTransport::Complete(ReadOp op, Status status) {
  while (const uint64_t piece = op.read.copying_bytes()) {  // what cannot be recalled
    if (op.read.LookAtCopy()) gate_.End(piece, piece);
  }
  control_.Deliver(std::move(op.done), {.status = std::move(status),
                                        .before = op.read.before(),
                                        .after = op.read.after(),
                                        .bytes = op.read.bytes()});
}

}  // namespace

Result<std::unique_ptr<Transport>> CreateMapped(Options options) {
  return MappedTransport::Create(std::move(options));
}

}  // namespace kvrelay::transport
