#include "transport/packed_rail.h"

#include <glog/logging.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <utility>
#include <vector>

#include "base/random.h"
#include "transport/control_side.h"
#include "transport/event_loop.h"
#include "transport/packed_lanes.h"
#include "transport/packed_receive.h"
#include "transport/packed_send.h"
#include "transport/packed_wire.h"
#include "transport/slot_ring.h"
#include "transport/transfer_thread.h"
#include "transport/transport.h"

namespace kvrelay::transport {
namespace {

constexpr size_t kRingSlots = 8;
constexpr size_t kMaxPings = 256;
// Nothing wakes a thread that sleeps when a forced close completes, and slots wait for that.
constexpr Duration kLookAtClosing = std::chrono::milliseconds(10);
// How long closing connections are waited for when the transport ends.
constexpr Duration kLanesFinishLimit = std::chrono::milliseconds(500);

class PackedRail final : public Transport, private TransferThread::Worker {
 public:
  static Result<std::unique_ptr<Transport>> Create(Options options,
                                                   std::unique_ptr<PackedCarrier> carrier);
  ~PackedRail() override {
    if (thread_) thread_->Stop();
    carrier_.reset();  // before the thread's loop, should it never have run
  }

  std::string_view name() const override { return name_; }
  Style style() const override { return Style::kPacked; }
  Address LocalAddress() const override { return address_; }
  std::string lanes() const override {
    return options_.device == nullptr ? "" : "pinned host memory";
  }
  Counters counters() const override;

  void Connect(PeerSpec spec, TimePoint deadline, std::function<void(Result<PeerHandle>)> connected,
               std::function<void()> on_death) override;
  void Disconnect(PeerHandle handle) override;
  OpId Read(PeerHandle, NextPortion, GuardRef, Terms, Done done) override {
    return control_.RefuseStart(
        std::move(done),
        Status(Code::kInvalidArgument, std::string(name_) + " has no one-sided reads"));
  }
  OpId StartPackedReceive(PeerHandle handle, StreamId stream, StreamPlan plan,
                          GuardExpectation want, Terms terms, Done done) override;
  OpId StartPackedSend(PeerSpec reader, StreamId stream, StreamPlan plan, const LeaseRecord* record,
                       GuardExpectation want, Terms terms, Done done) override;
  void Cancel(OpId op) override;

 private:
  // An owner that we read from. Its lane carries one ping, and is how we see it die.
  struct Peer {
    PeerSpec spec;
    TimePoint deadline;  // of connecting
    uint64_t nonce = 0;  // of the ping
    bool connecting = true;
    std::shared_ptr<PackedLane> lane;
  };
  struct Ping {
    uint64_t nonce = 0;
    Incarnation from = 0;
    std::string address;
  };

  PackedRail(Options options, std::unique_ptr<PackedCarrier> carrier)
      : options_(std::move(options)),
        name_(carrier->name()),
        max_bytes_per_peer_(carrier->max_bytes_per_peer()),
        control_(options_.executor),
        carrier_(std::move(carrier)) {}

  // Transfer thread.
  TimePoint Work(TimePoint now) override;
  bool PrepareToSleep() override { return carrier_->PrepareToSleep(); }
  void Finish() override;
  void OnMessage(std::span<const std::byte> bytes, std::span<const std::byte> data);
  void AdoptReceives();
  void AnswerPings(TimePoint now);
  void OnPong(const PackedHeader& header);
  TimePoint ExpirePeers(TimePoint now);
  // Ends a peer that was connecting (the callback gets `status`) or has died.
  void EndPeer(std::map<PeerHandle, Peer>::iterator it, const Status& status);
  void Publish();

  const Options options_;
  const std::string_view name_;
  const uint64_t max_bytes_per_peer_;
  ControlSide control_;
  Address address_;

  // Receives that the control thread has started and the transfer thread has not seen. Beside the
  // thread's tasks, because the first chunk may be here before the next task has run: it must find
  // its stream, or it would be dropped as a late one.
  std::mutex receives_mutex_;
  std::vector<PackedReceiver::Expected> receives_;

  // Written by the transfer thread, read by any.
  struct {
    std::atomic<uint64_t> dropped{0};
    std::atomic<uint64_t> bad{0};
    std::atomic<uint64_t> slots{0};
    std::atomic<uint64_t> connections{0};
    std::atomic<uint64_t> closing{0};
  } published_;

  // Transfer thread. The carrier goes first, see Finish.
  std::unique_ptr<PackedCarrier> carrier_;
  std::unique_ptr<PackedLanes> lanes_;
  std::unique_ptr<PackedSender> sender_;
  std::unique_ptr<PackedReceiver> receiver_;
  std::map<PeerHandle, Peer> peers_;
  std::vector<Ping> pings_;  // to be answered
  uint64_t bad_messages_ = 0;

  std::unique_ptr<TransferThread> thread_;
};

Result<std::unique_ptr<Transport>> PackedRail::Create(Options options,
                                                      std::unique_ptr<PackedCarrier> carrier) {
  std::unique_ptr<PackedRail> transport(new PackedRail(std::move(options), std::move(carrier)));
  const Options& own = transport->options_;
  PackedCarrier& packed = *transport->carrier_;
  KVRELAY_ASSIGN_OR_RETURN(
      transport->thread_, TransferThread::Create("kvr-" + std::string(transport->name_), own.spin));
  KVRELAY_ASSIGN_OR_RETURN(std::unique_ptr<SlotRing> ring,
                           SlotRing::Create(kRingSlots, own.chunk_bytes, own.device.get()));
  std::unique_ptr<SlotRing> staging;
  if (own.device != nullptr) {
    KVRELAY_ASSIGN_OR_RETURN(staging,
                             SlotRing::Create(kRingSlots, own.chunk_bytes, own.device.get()));
  }
  PackedRail* self = transport.get();
  KVRELAY_ASSIGN_OR_RETURN(const std::string worker_address,
                           packed.Start(
                               transport->thread_->loop(),
                               [self](auto header, auto data) { self->OnMessage(header, data); },
                               [self] { ++self->bad_messages_; }));
  transport->address_ =
      PackedAddress{
          .library = packed.library(), .incarnation = own.incarnation, .worker = worker_address}
          .Encode();
  const auto deliver = [self](Done done, Completion completion) {
    self->control_.Deliver(std::move(done), std::move(completion));
  };
  transport->lanes_ = std::make_unique<PackedLanes>(packed);
  transport->sender_ =
      std::make_unique<PackedSender>(own.regions, own.device.get(), own.incarnation,
                                     std::move(ring), *transport->lanes_, own.throttle, deliver);
  transport->receiver_ =
      std::make_unique<PackedReceiver>(own.regions, own.device.get(), std::move(staging), deliver);
  transport->thread_->Start(*transport);
  return transport;
}

// --- Control thread

void PackedRail::Connect(PeerSpec spec, TimePoint deadline,
                         std::function<void(Result<PeerHandle>)> connected,
                         std::function<void()> on_death) {
  const PeerHandle handle = control_.Watch(std::move(connected), std::move(on_death));
  thread_->Post([this, handle, deadline, spec = std::move(spec)]() mutable {
    const auto it = peers_.try_emplace(handle).first;
    Peer& peer = it->second;
    peer.spec = std::move(spec);
    peer.deadline = deadline;
    peer.nonce = Random64();
    auto lane = lanes_->Open(peer.spec.address, peer.spec.incarnation, EventLoop::Now());
    if (!lane.has_value()) return EndPeer(it, lane.error());
    peer.lane = std::move(*lane);
    PackedHeader ping;
    ping.kind = PackedKind::kPing;
    ping.stream = peer.nonce;
    ping.sender = options_.incarnation;
    peer.lane->SendOwned(ping, address_);
  });
}

void PackedRail::Disconnect(PeerHandle handle) {
  control_.Forget(handle);
  thread_->Post([this, handle] {
    receiver_->FailPeer(handle, Status(Code::kCancelled, "disconnected"));
    peers_.erase(handle);
  });
}

OpId PackedRail::StartPackedReceive(PeerHandle handle, StreamId stream, StreamPlan plan,
                                    GuardExpectation want, Terms terms, Done done) {
  const OpId id = control_.NextId();
  {
    const std::lock_guard lock(receives_mutex_);
    receives_.push_back({.op = id,
                         .peer = handle,
                         .peer_name = {},
                         .incarnation = 0,
                         .stream = stream,
                         .plan = std::move(plan),
                         .want = want,
                         .deadline = terms.deadline,
                         .done = std::move(done)});
  }
  thread_->Post([this] { AdoptReceives(); });
  return id;
}

OpId PackedRail::StartPackedSend(PeerSpec reader, StreamId stream, StreamPlan plan,
                                 const LeaseRecord* record, GuardExpectation want, Terms terms,
                                 Done done) {
  const OpId id = control_.NextId();
  thread_->Post([this, id, stream, record, want, terms, reader = std::move(reader),
                 plan = std::move(plan), done = std::move(done)]() mutable {
    auto lane = lanes_->Open(reader.address, reader.incarnation, EventLoop::Now());
    if (!lane.has_value()) {
      return control_.Refuse(std::move(done), lane.error().Wrap(reader.name));
    }
    sender_->Start({.op = id,
                    .reader_name = std::move(reader.name),
                    .lane = std::move(*lane),
                    .stream = stream,
                    .plan = std::move(plan),
                    .record = record,
                    .want = want,
                    .terms = terms,
                    .done = std::move(done)});
  });
  return id;
}

void PackedRail::Cancel(OpId op) {
  thread_->Post([this, op] {
    receiver_->Cancel(op);
    sender_->Cancel(op);
  });
}

Counters PackedRail::counters() const {
  return {{"dropped_messages", published_.dropped.load(std::memory_order_relaxed)},
          {"bad_messages", published_.bad.load(std::memory_order_relaxed)},
          {"slots_in_use", published_.slots.load(std::memory_order_relaxed)},
          {"connections", published_.connections.load(std::memory_order_relaxed)},
          {"closing_connections", published_.closing.load(std::memory_order_relaxed)},
          {"ring_bytes", (options_.device == nullptr ? 1 : 2) * kRingSlots * options_.chunk_bytes},
          {"max_bytes_per_peer", max_bytes_per_peer_}};
}

// --- Transfer thread

TimePoint PackedRail::Work(TimePoint now) {
  bool busy = carrier_->Progress();
  AnswerPings(now);
  lanes_->Reap();
  busy |= receiver_->LookAtUnpacking();
  busy |= sender_->Pump(now);
  TimePoint next = receiver_->Expire(now);
  next = std::min(next, sender_->Expire(now));
  next = std::min(next, ExpirePeers(now));
  if (lanes_->closing() > 0) next = std::min(next, now + kLookAtClosing);
  Publish();
  return busy ? kBusy : next;
}

void PackedRail::Finish() {
  const Status status(Code::kCancelled, "the transport is closing");
  receiver_->FailAll(status);
  sender_->FailAll(status);
  std::erase_if(peers_, [](const auto& entry) { return !entry.second.connecting; });
  while (!peers_.empty()) EndPeer(peers_.begin(), status);
  lanes_->CloseAll();
  for (const TimePoint limit = EventLoop::Now() + kLanesFinishLimit;
       lanes_->closing() > 0 && EventLoop::Now() < limit;) {
    carrier_->Progress();
    lanes_->Reap();
  }
  carrier_.reset();
}

void PackedRail::OnMessage(std::span<const std::byte> bytes, std::span<const std::byte> data) {
  const Result<PackedHeader> header = CheckHeader(bytes, data.size());
  if (!header.has_value()) {
    ++bad_messages_;
    LOG_EVERY_N(WARNING, 1000) << name_ << ": dropped " << header.error().message();
    return;
  }
  switch (header->kind) {
    case PackedKind::kChunk:
    case PackedKind::kStopped:
      if (!receiver_->Expects(header->stream)) AdoptReceives();
      receiver_->OnMessage(*header, data);
      return;
    case PackedKind::kPing:
      // Answered outside: an endpoint is not made inside a callback of the carrier.
      if (pings_.size() < kMaxPings) {
        pings_.push_back({.nonce = header->stream,
                          .from = header->sender,
                          .address = {reinterpret_cast<const char*>(data.data()), data.size()}});
      }
      return;
    case PackedKind::kPong:
      OnPong(*header);
      return;
  }
  ++bad_messages_;
}

void PackedRail::AdoptReceives() {
  std::vector<PackedReceiver::Expected> receives;
  {
    const std::lock_guard lock(receives_mutex_);
    receives.swap(receives_);
  }
  for (PackedReceiver::Expected& expected : receives) {
    const auto it = peers_.find(expected.peer);
    if (it == peers_.end() || it->second.connecting) {
      control_.Refuse(std::move(expected.done),
                      Status(Code::kPeerUnreachable, "the peer is not connected any more"));
      continue;
    }
    expected.peer_name = it->second.spec.name;
    expected.incarnation = it->second.spec.incarnation;
    receiver_->Start(std::move(expected));
  }
}

void PackedRail::AnswerPings(TimePoint now) {
  for (const Ping& ping : std::exchange(pings_, {})) {
    const auto lane = lanes_->Open(ping.address, ping.from, now);
    if (!lane.has_value()) {
      ++bad_messages_;
      continue;
    }
    PackedHeader pong;
    pong.kind = PackedKind::kPong;
    pong.stream = ping.nonce;
    pong.sender = options_.incarnation;
    (*lane)->SendOwned(pong, {});
  }
}

void PackedRail::OnPong(const PackedHeader& header) {
  for (auto& [handle, peer] : peers_) {
    if (peer.nonce != header.stream || !peer.connecting) continue;
    if (peer.spec.incarnation != header.sender) continue;
    peer.connecting = false;
    return control_.Connected(handle);
  }
}

TimePoint PackedRail::ExpirePeers(TimePoint now) {
  TimePoint next = TimePoint::max();
  for (auto it = peers_.begin(); it != peers_.end();) {
    const auto current = it++;
    const Peer& peer = current->second;
    if (!peer.lane->usable()) {
      EndPeer(current, peer.lane->failure());
    } else if (peer.connecting && peer.deadline <= now) {
      EndPeer(current, Status(Code::kDeadlineExceeded, "no answer over " + std::string(name_) +
                                                           " before the deadline (our " +
                                                           carrier_->where() + ")"));
    } else if (peer.connecting) {
      next = std::min(next, peer.deadline);
    }
  }
  return next;
}

void PackedRail::EndPeer(std::map<PeerHandle, Peer>::iterator it, const Status& status) {
  const auto& [handle, peer] = *it;
  if (!peer.connecting) {
    LOG(INFO) << name_ << ": " << peer.spec.name << ": " << status.message();
    receiver_->FailPeer(handle, status.Wrap(peer.spec.name));
  }
  control_.Lost(handle, status);
  peers_.erase(it);
}

void PackedRail::Publish() {
  published_.dropped.store(receiver_->dropped(), std::memory_order_relaxed);
  published_.bad.store(bad_messages_, std::memory_order_relaxed);
  published_.slots.store(sender_->slots_in_use(), std::memory_order_relaxed);
  published_.connections.store(lanes_->open().size(), std::memory_order_relaxed);
  published_.closing.store(lanes_->closing(), std::memory_order_relaxed);
}

}  // namespace

Result<std::unique_ptr<Transport>> CreatePackedRail(Options options,
                                                    std::unique_ptr<PackedCarrier> carrier) {
  return PackedRail::Create(std::move(options), std::move(carrier));
}

}  // namespace kvrelay::transport
