// The `ucx-get` transport: one-sided reads straight into our regions, on a UCX context of its own.
#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstring>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "transport/control_side.h"
#include "transport/event_loop.h"
#include "transport/get_address.h"
#include "transport/get_peers.h"
#include "transport/get_reads.h"
#include "transport/guard_pads.h"
#include "transport/plan_runs.h"
#include "transport/transfer_thread.h"
#include "transport/transport.h"
#include "transport/ucx_one_sided.h"
#include "transport/ucx_version.h"
#include "transport/ucx_worker.h"

namespace kvrelay::transport {
namespace {

// Only a thread that looks sees a peer die.
constexpr Duration kLookAtPeers = std::chrono::milliseconds(500);
// How long closing connections are waited for when the transport ends.
constexpr Duration kPeersFinishLimit = std::chrono::milliseconds(1500);
// An operation over cma costs as much as packing, sending and unpacking about this much.
constexpr uint64_t kGoodRunBytes = 16 << 10;

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

  void Connect(PeerSpec peer, TimePoint deadline, std::function<void(Result<PeerHandle>)> connected,
               std::function<void()> on_death) override;
  void Disconnect(PeerHandle peer) override;
  OpId Read(PeerHandle peer, NextPortion next, GuardRef guard, Terms terms, Done done) override;
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
  explicit UcxGet(Options options) : options_(std::move(options)), control_(options_.executor) {}
  Status Open();

  // Control thread.
  OpId RefusePacked(Done done) {
    return control_.RefuseStart(
        std::move(done), Status(Code::kInvalidArgument, "ucx-get is one-sided: it has no streams"));
  }

  // Transfer thread.
  TimePoint Work(TimePoint now) override;
  bool PrepareToSleep() override { return worker_->Arm(); }
  void Finish() override;
  void Publish();

  const Options options_;
  ControlSide control_;
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
  std::unique_ptr<GetPeers> peers_;
  std::unique_ptr<GetReads> reads_;
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
  KVRELAY_ASSIGN_OR_RETURN(
      pads_, GuardPads::Create(context, 1 + GetPeers::kMaxConnecting + GetReads::kMaxReads));
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
  std::byte* pad = pads_->Take();  // for good
  std::memcpy(pad, &beacon, sizeof(beacon));
  KVRELAY_ASSIGN_OR_RETURN(address.beacon, span_of(pad, sizeof(beacon), pads_->memory()));
  for (const LocalRegion& region : options_.regions) {
    KVRELAY_ASSIGN_OR_RETURN(std::unique_ptr<UcxMemory> memory,
                             UcxMemory::Register(context, {region.data, region.bytes}));
    KVRELAY_ASSIGN_OR_RETURN(GetAddress::Span span, span_of(region.data, region.bytes, *memory));
    address.regions.push_back(std::move(span));
    memory_.push_back(std::move(memory));
  }
  address_ = address.Encode();
  peers_ = std::make_unique<GetPeers>(*worker_, lanes_, self_, *pads_, control_);
  reads_ =
      std::make_unique<GetReads>(options_.regions, memory_, *pads_, control_, options_.throttle);
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

void UcxGet::Connect(PeerSpec peer, TimePoint deadline,
                     std::function<void(Result<PeerHandle>)> connected,
                     std::function<void()> on_death) {
  const PeerHandle handle = control_.Watch(std::move(connected), std::move(on_death));
  thread_->Post([this, handle, deadline, peer = std::move(peer)] {
    peers_->Connect(handle, peer, deadline, EventLoop::Now());
  });
}

void UcxGet::Disconnect(PeerHandle peer) {
  control_.Forget(peer);
  thread_->Post([this, peer] { peers_->Disconnect(peer, EventLoop::Now()); });
}

OpId UcxGet::Read(PeerHandle peer, NextPortion next, GuardRef guard, Terms terms, Done done) {
  const OpId id = control_.NextId();
  thread_->Post([this, id, peer, guard, terms, next = std::move(next),
                 done = std::move(done)]() mutable {
    std::shared_ptr<GetWay> way = peers_->Find(peer);
    if (way == nullptr) {
      return control_.Refuse(std::move(done),
                             Status(Code::kPeerUnreachable, "the peer is not connected any more"));
    }
    reads_->Start({.op = id,
                   .way = std::move(way),
                   .next = std::move(next),
                   .guard = guard,
                   .terms = terms,
                   .done = std::move(done)});
  });
  return id;
}

void UcxGet::Cancel(OpId op) {
  thread_->Post([this, op] { reads_->Cancel(op, EventLoop::Now()); });
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
  busy |= reads_->Step(now);
  TimePoint next = reads_->Expire(now);
  next = std::min(next, peers_->Look(now, *reads_));
  Publish();
  if (!peers_->empty()) next = std::min(next, now + kLookAtPeers);
  return busy ? kBusy : next;
}

void UcxGet::Finish() {
  const Status status(Code::kCancelled, "the transport is closing");
  const TimePoint now = EventLoop::Now();
  peers_->DisconnectAll(status, now);
  for (const TimePoint limit = now + kPeersFinishLimit;
       !peers_->empty() && EventLoop::Now() < limit;) {
    worker_->Progress();
    reads_->Expire(EventLoop::Now());
    peers_->Look(EventLoop::Now(), *reads_);
  }
  thread_->loop().Unwatch(event_fd_);
  // What is still in flight ends with the worker: only then may its destination be used again.
  peers_->DropKeys();
  worker_.reset();
  reads_->CompleteAll(status);
  peers_.reset();
  pads_.reset();
  memory_.clear();
}

void UcxGet::Publish() {
  const GetReads::Quarantine quarantine = reads_->quarantine();
  published_.reads.store(reads_->size(), std::memory_order_relaxed);
  published_.quarantined_reads.store(quarantine.reads, std::memory_order_relaxed);
  published_.quarantined_bytes.store(quarantine.bytes, std::memory_order_relaxed);
  published_.closing.store(peers_->closing(), std::memory_order_relaxed);
}

}  // namespace

Result<std::unique_ptr<Transport>> CreateUcxGet(Options options) {
  return UcxGet::Create(std::move(options));
}

}  // namespace kvrelay::transport
