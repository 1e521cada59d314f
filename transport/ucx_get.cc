// The `ucx-get` transport: one-sided reads straight into our regions, on a UCX context of its own.
#include <glog/logging.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstring>
#include <list>
#include <map>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "transport/control_side.h"
#include "transport/get_address.h"
#include "transport/get_read.h"
#include "transport/get_way.h"
#include "transport/guard_pads.h"
#include "transport/plan_runs.h"
#include "transport/transfer_thread.h"
#include "transport/transport.h"
#include "transport/turns.h"
#include "transport/ucx_one_sided.h"
#include "transport/ucx_version.h"
#include "transport/ucx_worker.h"

namespace kvrelay::transport {
namespace {

constexpr size_t kMaxReads = 1024;
constexpr size_t kMaxHellos = 256;
// How long what is in flight of an ended read may take before its connection is closed.
constexpr Duration kDrainLimit = std::chrono::milliseconds(500);
// Only a thread that looks sees a peer die.
constexpr Duration kLookAgain = std::chrono::milliseconds(500);
// How long closing connections are waited for when the transport ends.
constexpr Duration kFinishLimit = std::chrono::milliseconds(1500);
// An operation over cma costs as much as packing, sending and unpacking about this much.
constexpr uint64_t kGoodRunBytes = 16 << 10;
// Posted before the thread looks around: over cma they are copied by then, in about a millisecond.
constexpr uint64_t kTurnBytes = 4 << 20;

TimePoint Now() { return std::chrono::steady_clock::now(); }

class UcxGet final : public Transport, private TransferThread::Worker {
 public:
  static Result<std::unique_ptr<Transport>> Create(Options options);
  ~UcxGet() override {
    if (thread_) thread_->Stop();
  }

  std::string_view name() const override { return "ucx-get"; }
  Style style() const override { return Style::kOneSided; }
  Address LocalAddress() const override { return address_; }
  std::string lanes() const override { return lanes_.names; }
  Fitness FitnessFor(const CopyPlan& plan) const override;
  bool moves_any_plan() const override { return false; }
  bool lingers() const override { return true; }
  Counters counters() const override;

  void Connect(PeerSpec spec, TimePoint deadline, std::function<void(Result<PeerHandle>)> connected,
               std::function<void()> on_death) override;
  void Disconnect(PeerHandle handle) override;
  OpId Read(PeerHandle peer, NextPortion next, GuardRef guard, Terms terms, Done done) override;
  OpId StartPackedReceive(PeerHandle, StreamId, StreamPlan, GuardExpectation, Terms,
                          Done done) override {
    return RefusePacked(std::move(done));
  }
  OpId StartPackedSend(PeerSpec, StreamId, StreamPlan, const LeaseRecord*, GuardExpectation, Terms,
                       Done done) override {
    return RefusePacked(std::move(done));
  }
  void Cancel(OpId id) override;

 private:
  struct Peer {
    TimePoint deadline;  // of connecting
    bool connecting = true;
    std::shared_ptr<GetWay> way;
  };
  // The first read of a way, of the owner's beacon.
  struct Hello {
    PeerHandle peer = 0;
    std::shared_ptr<GetWay> way;
    Beacon expected;
    std::byte* pad = nullptr;
    UcxGets gets = {};
  };
  struct ReadOp {
    OpId id = 0;
    PeerHandle peer = 0;
    TimePoint deadline;
    Turns::Place place;
    Done done;
    std::shared_ptr<GetWay> way;
    std::byte* pad = nullptr;
    GetRead read;
    Status ended = {};          // not ok: posts nothing more, completes with it when it is drained
    TimePoint drained_by = {};  // else the way is closed
  };
  using Reads = std::list<ReadOp>;
  using Peers = std::map<PeerHandle, Peer>;

  explicit UcxGet(Options options) : options_(std::move(options)), control_(options_.executor) {
    for (const LocalRegion& region : options_.regions) {
      local_bases_.push_back(region.data);
      local_bytes_.push_back(region.bytes);
    }
  }
  Status Open();

  // Transfer thread.
  TimePoint Work(TimePoint now) override;
  bool PrepareToSleep() override { return worker_->Arm(); }
  void Finish() override;
  void StartConnect(PeerHandle handle, const PeerSpec& spec, TimePoint deadline);
  void StartRead(OpId id, PeerHandle handle, NextPortion next, GuardRef guard, const Terms& terms,
                 Done done);
  bool StepReads(TimePoint now);
  // Makes the read post nothing more; it completes once it is drained.
  static void End(ReadOp& op, Status status, TimePoint now);
  // Ends the reads on it, too.
  void EndWay(const std::shared_ptr<GetWay>& way, const Status& why, TimePoint now,
              Duration grace = kDrainLimit);
  // Ends ways that have failed, and closes those on which nothing moves any more.
  TimePoint CloseWays(TimePoint now);
  // Completes what is drained, ends what is late. Returns when to look again.
  TimePoint ExpireReads(TimePoint now);
  void TakeHellos();
  TimePoint ExpirePeers(TimePoint now);
  void EndPeer(Peers::iterator it, const Status& status);
  void Reap();
  Reads::iterator Complete(Reads::iterator it, Status status);
  void Publish();

  // Control thread.
  OpId RefusePacked(Done done) {
    return control_.RefuseStart(
        std::move(done), Status(Code::kInvalidArgument, "ucx-get is one-sided: it has no streams"));
  }

  const Options options_;
  ControlSide control_;
  std::vector<std::byte*> local_bases_;
  std::vector<uint64_t> local_bytes_;
  OneSidedLanes lanes_;
  HostIdentity self_;
  Address address_;

  // Written by the transfer thread, read by any.
  struct {
    std::atomic<uint64_t> reads{0};
    std::atomic<uint64_t> quarantined_reads{0};
    std::atomic<uint64_t> quarantined_bytes{0};
    std::atomic<uint64_t> closing{0};
  } published_;

  // Transfer thread. Registered memory and ways refer to context and worker; the worker goes first,
  // see Finish.
  std::shared_ptr<UcxWorker> worker_;
  std::vector<std::unique_ptr<UcxMemory>> memory_;  // of our regions
  std::unique_ptr<GuardPads> pads_;
  std::byte* beacon_ = nullptr;
  Peers peers_;
  std::list<std::shared_ptr<GetWay>> ways_;  // that have not closed
  Turns turns_{kTurnBytes};
  Reads reads_;
  std::list<Hello> hellos_;
  int event_fd_ = -1;

  std::unique_ptr<TransferThread> thread_;
};

Result<std::unique_ptr<Transport>> UcxGet::Create(Options options) {
  std::unique_ptr<UcxGet> transport(new UcxGet(std::move(options)));
  KVRELAY_RETURN_IF_ERROR(transport->Open());
  transport->thread_->Start(*transport);
  return transport;
}

Status UcxGet::Open() {
  if (options_.regions.size() > GetAddress::kMaxRegions) {
    return Error(Code::kInvalidArgument,
                 "ucx-get serves " + std::to_string(GetAddress::kMaxRegions) + " regions, not " +
                     std::to_string(options_.regions.size()));
  }
  KVRELAY_ASSIGN_OR_RETURN(lanes_, FindOneSidedLanes(options_.data_interface));
  KVRELAY_ASSIGN_OR_RETURN(self_, ThisHost(options_.host_id));
  KVRELAY_ASSIGN_OR_RETURN(thread_, TransferThread::Create("kvr-ucx-get", options_.spin));
  KVRELAY_ASSIGN_OR_RETURN(const std::shared_ptr<UcxContext> context,
                           UcxContext::CreateOneSided(lanes_));
  KVRELAY_ASSIGN_OR_RETURN(worker_, UcxWorker::Create(context));
  KVRELAY_ASSIGN_OR_RETURN(pads_, GuardPads::Create(context, 1 + kMaxHellos + kMaxReads));
  const auto span_of = [](std::byte* base, uint64_t bytes,
                          const UcxMemory& memory) -> Result<GetAddress::Span> {
    KVRELAY_ASSIGN_OR_RETURN(std::string key, memory.Key());
    return GetAddress::Span{reinterpret_cast<uintptr_t>(base), bytes, std::move(key)};
  };
  GetAddress address{.library = UcxLibrary(),
                     .host = self_,
                     .incarnation = options_.incarnation,
                     .worker = {},
                     .beacon = {},
                     .regions = {}};
  KVRELAY_ASSIGN_OR_RETURN(address.worker, worker_->Address());
  const Beacon beacon{.incarnation = options_.incarnation};
  beacon_ = pads_->Take();
  std::memcpy(beacon_, &beacon, sizeof(beacon));
  KVRELAY_ASSIGN_OR_RETURN(address.beacon, span_of(beacon_, sizeof(beacon), pads_->memory()));
  for (const LocalRegion& region : options_.regions) {
    KVRELAY_ASSIGN_OR_RETURN(std::unique_ptr<UcxMemory> memory,
                             UcxMemory::Register(context, {region.data, region.bytes}));
    KVRELAY_ASSIGN_OR_RETURN(GetAddress::Span span, span_of(region.data, region.bytes, *memory));
    address.regions.push_back(std::move(span));
    memory_.push_back(std::move(memory));
  }
  address_ = address.Encode();
  KVRELAY_ASSIGN_OR_RETURN(event_fd_, worker_->EventFd());
  return thread_->loop().Watch(event_fd_, EPOLLIN, [](uint32_t) {});
}

// --- Control thread

Fitness UcxGet::FitnessFor(const CopyPlan& plan) const {
  using Fit = Fitness::Fit;
  if (std::ranges::any_of(plan.boxes, [](const CopyBox& box) { return box.casts; })) {
    return {Fit::kNo, "one-sided reads cast no numbers"};
  }
  const uint64_t mean = MeanRunBytes(plan);
  if (mean >= kGoodRunBytes) return {};
  return {Fit::kPoor, "runs of " + std::to_string(mean) + " bytes are short for one-sided reads"};
}

void UcxGet::Connect(PeerSpec spec, TimePoint deadline,
                     std::function<void(Result<PeerHandle>)> connected,
                     std::function<void()> on_death) {
  const PeerHandle handle = control_.Watch(std::move(connected), std::move(on_death));
  thread_->Post(
      [this, handle, deadline, spec = std::move(spec)] { StartConnect(handle, spec, deadline); });
}

void UcxGet::Disconnect(PeerHandle handle) {
  control_.Forget(handle);
  thread_->Post([this, handle] {
    const auto it = peers_.find(handle);
    if (it == peers_.end()) return;
    EndPeer(it, Status(Code::kCancelled, "disconnected"));
  });
}

OpId UcxGet::Read(PeerHandle peer, NextPortion next, GuardRef guard, Terms terms, Done done) {
  const OpId id = control_.NextId();
  thread_->Post(
      [this, id, peer, guard, terms, next = std::move(next), done = std::move(done)]() mutable {
        StartRead(id, peer, std::move(next), guard, terms, std::move(done));
      });
  return id;
}

void UcxGet::Cancel(OpId id) {
  thread_->Post([this, id] {
    for (ReadOp& op : reads_) {
      if (op.id == id) End(op, Status(Code::kCancelled, "cancelled"), Now());
    }
  });
}

Counters UcxGet::counters() const {
  return {{"reads", published_.reads.load(std::memory_order_relaxed)},
          {"quarantined_reads", published_.quarantined_reads.load(std::memory_order_relaxed)},
          {"quarantined_bytes", published_.quarantined_bytes.load(std::memory_order_relaxed)},
          {"closing_connections", published_.closing.load(std::memory_order_relaxed)}};
}

// --- Transfer thread

TimePoint UcxGet::Work(TimePoint now) {
  bool busy = worker_->Progress();
  busy |= StepReads(now);
  TimePoint next = CloseWays(now);
  next = std::min(next, ExpireReads(now));
  TakeHellos();
  next = std::min(next, ExpirePeers(now));
  Reap();
  Publish();
  if (!ways_.empty()) next = std::min(next, now + kLookAgain);
  return busy ? kBusy : next;
}

void UcxGet::Finish() {
  const TimePoint now = Now();
  const Status status(Code::kCancelled, "the transport is closing");
  while (!peers_.empty()) EndPeer(peers_.begin(), status);
  for (const TimePoint limit = now + kFinishLimit; !ways_.empty() && Now() < limit;) {
    worker_->Progress();
    CloseWays(Now());
    ExpireReads(Now());
    TakeHellos();
    Reap();
  }
  thread_->loop().Unwatch(event_fd_);
  // What is still in flight ends with the worker: only then may its destination be used again.
  for (const auto& way : ways_) way->DropKeys();
  worker_.reset();
  for (auto it = reads_.begin(); it != reads_.end();) it = Complete(it, it->ended);
  pads_.reset();
  memory_.clear();
}

void UcxGet::StartConnect(PeerHandle handle, const PeerSpec& spec, TimePoint deadline) {
  const auto it = peers_.try_emplace(handle).first;
  it->second.deadline = deadline;
  if (hellos_.size() >= kMaxHellos) {
    return EndPeer(it, Status(Code::kOverloaded,
                              std::to_string(kMaxHellos) + " peers are being connected already"));
  }
  auto way = GetWay::Open(*worker_, spec, lanes_.cross_hosts ? nullptr : &self_);
  if (!way.has_value()) return EndPeer(it, way.error());
  ways_.push_back(*way);
  it->second.way = *way;
  if (!(*way)->failure().ok()) return EndPeer(it, (*way)->failure());
  Hello& hello = hellos_.emplace_back(Hello{.peer = handle,
                                            .way = *way,
                                            .expected = {.incarnation = spec.incarnation},
                                            .pad = pads_->Take()});
  (*way)->GetBeacon({hello.pad, sizeof(Beacon)}, pads_->memory(), &hello.gets);
}

void UcxGet::TakeHellos() {
  for (auto it = hellos_.begin(); it != hellos_.end();) {
    const auto hello = it++;
    if (hello->gets.in_flight > 0) continue;
    if (const auto peer = peers_.find(hello->peer);
        peer != peers_.end() && peer->second.connecting) {
      Beacon beacon;
      std::memcpy(&beacon, hello->pad, sizeof(beacon));
      if (hello->gets.failure != UCS_OK) {
        EndPeer(peer, Status(Code::kPeerUnreachable, std::string("no one-sided read of it: ") +
                                                         ucs_status_string(hello->gets.failure)));
      } else if (beacon.magic != Beacon::kMagic ||
                 beacon.incarnation != hello->expected.incarnation) {
        EndPeer(peer, Status(Code::kPeerUnreachable, "another process than the handshake's"));
      } else {
        peer->second.connecting = false;
        control_.Connected(hello->peer);
      }
    }
    if (!hello->way->Drained(hello->gets)) continue;
    pads_->Give(hello->pad);
    hellos_.erase(hello);
  }
}

void UcxGet::StartRead(OpId id, PeerHandle handle, NextPortion next, GuardRef guard,
                       const Terms& terms, Done done) {
  const auto it = peers_.find(handle);
  if (it == peers_.end() || it->second.connecting || !it->second.way->failure().ok()) {
    return control_.Refuse(std::move(done),
                           Status(Code::kPeerUnreachable, "the peer is not connected any more"));
  }
  const std::shared_ptr<GetWay>& way = it->second.way;
  if (Status status = CheckGuard(guard, way->region_bytes()); !status.ok()) {
    return control_.Refuse(std::move(done), status.Wrap(way->name()));
  }
  if (reads_.size() >= kMaxReads) {
    return control_.Refuse(
        std::move(done),
        Status(Code::kOverloaded, std::to_string(kMaxReads) + " reads are in flight already"));
  }
  std::byte* pad = pads_->Take();
  reads_.push_back({.id = id,
                    .peer = handle,
                    .deadline = terms.deadline,
                    .place = turns_.Enter(terms),
                    .done = std::move(done),
                    .way = way,
                    .pad = pad,
                    .read = GetRead(std::move(next), guard,
                                    {.regions = local_bases_,
                                     .region_bytes = local_bytes_,
                                     .memory = memory_,
                                     .guard = pad,
                                     .guard_memory = &pads_->memory()})});
}

bool UcxGet::StepReads(TimePoint now) {
  bool busy = false;
  // What is posted is on its way and goes before whatever comes later: nothing is, as long as
  // something more urgent is left to post.
  Priority urgent = Priority::kPrefetch;
  uint64_t room = kTurnBytes;
  reads_.sort([](const ReadOp& a, const ReadOp& b) { return a.place.Before(b.place); });
  for (auto it = reads_.begin(); it != reads_.end();) {
    const auto op = it++;
    if (!op->ended.ok() || op->read.poll_at() > now) continue;
    const uint64_t before = op->read.bytes();
    const GetRead::State state =
        op->read.Step(*op->way, now, op->place.priority() < urgent ? 0 : room);
    const uint64_t posted = op->read.bytes() - before;
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
        if (op->read.gets().failure != UCS_OK) EndWay(op->way, op->read.failure(), now);
        busy = true;
        break;
    }
  }
  return busy;
}

void UcxGet::End(ReadOp& op, Status status, TimePoint now) {
  if (!op.ended.ok()) return;
  op.ended = std::move(status);
  op.drained_by = now + kDrainLimit;
}

void UcxGet::EndWay(const std::shared_ptr<GetWay>& way, const Status& why, TimePoint now,
                    Duration grace) {
  way->End(why, now + grace);
  for (ReadOp& op : reads_) {
    if (op.way == way) End(op, why.Wrap(way->name()), now);
  }
}

TimePoint UcxGet::CloseWays(TimePoint now) {
  TimePoint next = TimePoint::max();
  for (const auto& way : ways_) {
    if (!way->ended() && !way->failure().ok()) EndWay(way, way->failure(), now);
    if (!way->ended() || way->closing()) continue;
    const auto moves = [&](const auto& op, const UcxGets& gets) {
      return op.way == way && gets.in_flight > 0;
    };
    const bool busy =
        std::ranges::any_of(reads_, [&](const ReadOp& op) { return moves(op, op.read.gets()); }) ||
        std::ranges::any_of(hellos_, [&](const Hello& op) { return moves(op, op.gets); });
    if (busy && now < way->close_by()) {
      next = std::min(next, way->close_by());
    } else {
      way->Close();
    }
  }
  return next;
}

TimePoint UcxGet::ExpireReads(TimePoint now) {
  TimePoint next = TimePoint::max();
  for (auto it = reads_.begin(); it != reads_.end();) {
    if (it->ended.ok() && it->deadline <= now) {
      End(*it,
          Status(Code::kDeadlineExceeded, it->way->name() + ": the read's deadline came after " +
                                              std::to_string(it->read.bytes()) + " bytes"),
          now);
    }
    if (it->ended.ok()) {
      next = std::min(next, it->deadline);
      if (it->read.poll_at() > now) next = std::min(next, it->read.poll_at());
      ++it;
    } else if (it->way->Drained(it->read.gets())) {
      it = Complete(it, it->ended);
    } else {
      if (it->drained_by <= now) {
        EndWay(it->way, Status(Code::kPeerUnreachable, "its operations did not end"), now, {});
      } else if (!it->way->ended()) {
        next = std::min(next, it->drained_by);
      }
      ++it;
    }
  }
  return next;
}

TimePoint UcxGet::ExpirePeers(TimePoint now) {
  TimePoint next = TimePoint::max();
  for (auto it = peers_.begin(); it != peers_.end();) {
    const auto peer = it++;
    if (!peer->second.way->failure().ok()) {
      // Told of once nothing that reads from it is left.
      const bool reading =
          std::ranges::any_of(reads_, [&](const ReadOp& op) { return op.peer == peer->first; });
      if (!reading) EndPeer(peer, peer->second.way->failure());
    } else if (peer->second.connecting && peer->second.deadline <= now) {
      EndPeer(peer, Status(Code::kDeadlineExceeded,
                           "no one-sided read of it before the deadline (" + lanes_.names + ")"));
    } else if (peer->second.connecting) {
      next = std::min(next, peer->second.deadline);
    }
  }
  return next;
}

void UcxGet::EndPeer(Peers::iterator it, const Status& status) {
  const PeerHandle handle = it->first;
  const Peer peer = std::move(it->second);
  peers_.erase(it);
  if (peer.way) EndWay(peer.way, status, Now());
  if (!peer.connecting) {
    if (status.code() == Code::kCancelled) return;  // it was ours to end
    LOG(INFO) << "ucx-get: " << peer.way->name() << ": " << status.message();
  }
  control_.Lost(handle, status);
}

void UcxGet::Reap() {
  ways_.remove_if([](const std::shared_ptr<GetWay>& way) {
    return way->closed() && way.use_count() == 1;  // no read, peer or hello holds it
  });
}

UcxGet::Reads::iterator UcxGet::Complete(Reads::iterator it, Status status) {
  pads_->Give(it->pad);
  control_.Deliver(std::move(it->done), {.status = std::move(status),
                                         .before = it->read.before(),
                                         .after = it->read.after(),
                                         .bytes = it->read.bytes()});
  return reads_.erase(it);
}

void UcxGet::Publish() {
  uint64_t reads = 0;
  uint64_t bytes = 0;
  for (const ReadOp& op : reads_) {
    if (op.ended.ok()) continue;
    ++reads;
    bytes += op.read.bytes();
  }
  published_.reads.store(reads_.size(), std::memory_order_relaxed);
  published_.quarantined_reads.store(reads, std::memory_order_relaxed);
  published_.quarantined_bytes.store(bytes, std::memory_order_relaxed);
  published_.closing.store(ways_.size() - std::min(ways_.size(), peers_.size()),
                           std::memory_order_relaxed);
}

}  // namespace

Result<std::unique_ptr<Transport>> CreateUcxGet(Options options) {
  return UcxGet::Create(std::move(options));
}

}  // namespace kvrelay::transport
