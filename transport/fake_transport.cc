#include "transport/fake_transport.h"

#include <algorithm>
#include <cstring>
#include <numeric>
#include <utility>

namespace kvrelay::transport {

void FakeFabric::Kill(const Address& address) {
  const auto it = memory_.find(address);
  if (it != memory_.end()) it->second.alive = false;
  transports_.erase(address);
  for (const auto& [other, transport] : transports_) transport->OnPeerDeath(address);
}

FakeTransport::FakeTransport(FakeFabric& fabric, Clock& clock, std::string name, Style style,
                             Address address, std::vector<LocalRegion> regions,
                             Incarnation incarnation, std::shared_ptr<Throttle> throttle)
    : fabric_(fabric),
      clock_(clock),
      name_(std::move(name)),
      style_(style),
      address_(std::move(address)),
      regions_(std::move(regions)),
      gate_(std::move(throttle)) {
  fabric_.memory_[address_] = {regions_, incarnation, true};
  fabric_.transports_[address_] = this;
}

FakeTransport::~FakeTransport() { fabric_.transports_.erase(address_); }

void FakeTransport::Connect(PeerSpec peer, TimePoint /*deadline*/,
                            std::function<void(Result<PeerHandle>)> connected,
                            std::function<void()> on_death) {
  clock_.CallAfter(
      fabric_.UpTo(Millis(2)), [this, peer = std::move(peer), connected = std::move(connected),
                                on_death = std::move(on_death)]() mutable {
        const auto it = fabric_.memory_.find(peer.address);
        if (it == fabric_.memory_.end() || !it->second.alive ||
            it->second.incarnation != peer.incarnation ||
            fabric_.Chance(fabric_.script.refuse_connect)) {
          return connected(Error(Code::kPeerUnreachable, peer.name + " cannot be connected"));
        }
        const PeerHandle handle = next_++;
        peers_[handle] = {peer.address, std::move(on_death)};
        connected(handle);
      });
}

void FakeTransport::Disconnect(PeerHandle peer) {
  peers_.erase(peer);
  std::vector<OpId> ids;
  for (const auto& [id, op] : ops_) {
    if (op.peer == peer && op.kind != Op::Kind::kSend) ids.push_back(id);
  }
  for (const OpId id : ids) End(id, {Code::kPeerUnreachable, "disconnected"});
}

void FakeTransport::OnPeerDeath(const Address& address) {
  for (const auto& [handle, peer] : peers_) {
    if (peer.address != address) continue;
    clock_.CallAfter(fabric_.UpTo(fabric_.script.death_notice), [this, handle = handle] {
      const auto it = peers_.find(handle);
      if (it == peers_.end()) return;
      const auto on_death = std::move(it->second.on_death);
      Disconnect(handle);
      on_death();
    });
  }
}

OpId FakeTransport::Start(Op op, const Terms& terms) {
  const OpId id = next_++;
  if (fabric_.on_start) fabric_.on_start(terms);
  if (fabric_.Chance(fabric_.script.fail)) op.fail_after = fabric_.Below(32);
  op.stalled = fabric_.Chance(fabric_.script.stall);
  op.place = turns_.Enter(terms);
  op.deadline = clock_.CallAt(terms.deadline, [this, id] {
    End(id, {Code::kDeadlineExceeded, "the operation's deadline passed"});
  });
  ops_.emplace(id, std::move(op));
  return id;
}

void FakeTransport::Later(Duration most, OpId id, void (FakeTransport::*step)(OpId)) {
  clock_.CallAfter(fabric_.UpTo(most), [this, id, step] {
    if (ops_.contains(id)) (this->*step)(id);
  });
}

OpId FakeTransport::Read(PeerHandle peer, NextPortion next, GuardRef guard, Terms terms,
                         Done done) {
  Op op;
  op.kind = Op::Kind::kRead;
  op.peer = peer;
  op.next = std::move(next);
  op.done = std::move(done);
  const auto it = peers_.find(peer);
  if (it == peers_.end()) {
    const OpId id = Start(std::move(op), terms);
    End(id, {Code::kPeerUnreachable, "no such peer"});
    return id;
  }
  const std::vector<LocalRegion>& regions = fabric_.memory_.at(it->second.address).regions;
  op.record = reinterpret_cast<const LeaseRecord*>(regions.at(guard.region).data + guard.offset);
  op.from = &regions;
  const OpId id = Start(std::move(op), terms);
  Later(fabric_.script.pause, id, &FakeTransport::StepRead);
  return id;
}

// The guard, then the words of a portion, and so on. After the last one: the guard again.
void FakeTransport::StepRead(OpId id) {
  Op& op = ops_.at(id);
  if (!op.words.empty()) {
    if (!MoveSome(id, op)) return;
  } else if (op.last) {
    op.completion.after = op.record->ReadAfter();
    return Complete(id, Status::Ok());
  } else {
    op.completion.before = op.record->ReadBefore();
    auto portion = op.next(op.completion.before);
    if (!portion.has_value()) return Complete(id, portion.error());
    op.words = Words(portion->plan, *op.from, regions_);
    op.completion.bytes += portion->plan.bytes();
    op.last = portion->last;
  }
  Later(fabric_.script.pause, id, &FakeTransport::StepRead);
}

bool FakeTransport::MoveSome(OpId id, Op& op) {
  if (op.stalled && !op.ending) return false;  // until End
  uint64_t n = 1 + fabric_.Below(fabric_.script.words_per_step);
  const uint64_t piece = n * sizeof(uint64_t);
  const bool gated = op.kind != Op::Kind::kReceive;  // its owner has counted them
  if (gated && !MayMove(op, piece)) return true;
  uint64_t moved = 0;
  bool broken = false;
  for (; n > 0 && !op.words.empty() && !broken; --n) {
    broken = op.fail_after-- == 0;
    if (broken) break;
    const Word word = op.words.back();
    op.words.pop_back();
    *word.to = *word.from;
    moved += sizeof(uint64_t);
  }
  if (gated) {
    gate_.End(piece, moved);
    turns_.Moved(op.place, moved);
  }
  if (broken) End(id, {Code::kPeerUnreachable, "the link broke"});
  return !broken;
}

bool FakeTransport::MayMove(const Op& op, uint64_t bytes) {
  if (fabric_.script.in_turn) {
    for (const auto& [id, other] : ops_) {
      const bool can = other.kind != Op::Kind::kReceive && !other.words.empty() && !other.stalled;
      if (can && other.place.Before(op.place)) return false;
    }
  }
  return gate_.Begin(op.place.priority(), bytes, clock_.Now());
}

std::vector<FakeTransport::Word> FakeTransport::Words(const CopyPlan& plan,
                                                      const std::vector<LocalRegion>& from,
                                                      const std::vector<LocalRegion>& to) {
  std::vector<Word> words;
  words.reserve(plan.bytes() / sizeof(uint64_t));
  ForEachRun(plan, [&](const CopyBox& box, const PlanRun& run) {
    const auto* src = reinterpret_cast<const uint64_t*>(from.at(run.src_region).data + run.src);
    auto* dst = reinterpret_cast<uint64_t*>(to.at(run.dst_region).data + run.dst);
    for (uint64_t w = 0; w < box.run_bytes / sizeof(uint64_t); ++w)
      words.push_back({src + w, dst + w});
  });
  for (size_t i = words.size(); i > 1; --i) std::swap(words[i - 1], words[fabric_.Below(i)]);
  return words;
}

OpId FakeTransport::StartPackedSend(PeerSpec reader, StreamId stream, StreamPlan plan,
                                    const LeaseRecord* record, GuardExpectation want, Terms terms,
                                    Done done) {
  Op op;
  op.kind = Op::Kind::kSend;
  op.peer = 0;
  op.done = std::move(done);
  op.record = record;
  op.want = want;
  op.stream = stream;
  op.plan = std::move(plan);
  op.left.resize(op.plan.chunks);
  std::iota(op.left.begin(), op.left.end(), 0U);
  op.reader = reader.address;
  const OpId id = Start(std::move(op), terms);
  Later(fabric_.script.pause, id, &FakeTransport::BeginChunk);
  return id;
}

void FakeTransport::BeginChunk(OpId id) {
  Op& op = ops_.at(id);
  if (op.left.empty()) return Complete(id, Status::Ok());
  op.completion.before = op.record->ReadBefore();
  const Progress progress = Progress::Unpack(op.completion.before.w1);
  const auto ready = std::ranges::find_if(op.left, [&](uint32_t chunk) {
    return !op.plan.extent_of || Covers(progress, op.plan.extent_of(chunk));
  });
  if (ready == op.left.end()) return Later(fabric_.script.pause, id, &FakeTransport::BeginChunk);
  op.chunk = *ready;
  op.left.erase(ready);
  const auto plan = op.plan.plan_chunk(op.chunk);
  if (!plan.has_value()) return Complete(id, plan.error());
  op.buffer = std::make_shared<std::vector<uint64_t>>(plan->bytes() / sizeof(uint64_t));
  op.words = Words(*plan, regions_,
                   {{reinterpret_cast<std::byte*>(op.buffer->data()), plan->bytes(), -1}});
  Later(fabric_.script.pause, id, &FakeTransport::StepPack);
}

void FakeTransport::StepPack(OpId id) {
  Op& op = ops_.at(id);
  if (!op.words.empty()) {
    if (MoveSome(id, op)) Later(fabric_.script.pause, id, &FakeTransport::StepPack);
    return;
  }
  op.completion.after = op.record->ReadAfter();
  Chunk chunk{op.chunk, op.buffer, op.completion.before, op.completion.after};
  const bool holds = GuardHolds(op.plan.Want(op.want, op.chunk), chunk.before, chunk.after);
  const auto reader = fabric_.transports_.find(op.reader);
  if (reader != fabric_.transports_.end() && !fabric_.Chance(fabric_.script.lose_chunk)) {
    reader->second->Arrive(op.stream, std::move(chunk));
  }
  if (!holds) return Complete(id, {Code::kStaleRead, "the lease changed while it was packed"});
  Later(fabric_.script.pause, id, &FakeTransport::BeginChunk);
}

OpId FakeTransport::StartPackedReceive(PeerHandle peer, StreamId stream, StreamPlan plan,
                                       GuardExpectation want, Terms terms, Done done) {
  Op op;
  op.kind = Op::Kind::kReceive;
  op.peer = peer;
  op.done = std::move(done);
  op.want = want;
  op.stream = stream;
  op.plan = std::move(plan);
  const OpId id = Start(std::move(op), terms);
  receives_[stream] = id;
  if (!peers_.contains(peer)) End(id, {Code::kPeerUnreachable, "no such peer"});
  return id;
}

void FakeTransport::Arrive(StreamId stream, Chunk chunk) {
  const auto it = receives_.find(stream);
  if (it == receives_.end()) return;  // cancelled meanwhile
  Op& op = ops_.at(it->second);
  op.arrived.push_back(std::move(chunk));
  if (std::exchange(op.unpacking, true)) return;
  Later(fabric_.script.pause, it->second, &FakeTransport::StepUnpack);
}

void FakeTransport::StepUnpack(OpId id) {
  Op& op = ops_.at(id);
  if (op.words.empty() && op.buffer) {  // a chunk is done
    op.buffer.reset();
    if (op.have.size() == op.plan.chunks) return Complete(id, Status::Ok());
  }
  if (op.words.empty()) {
    if (op.arrived.empty() || op.ending) {
      op.unpacking = false;
      return;
    }
    const Chunk chunk = std::move(op.arrived.front());
    op.arrived.erase(op.arrived.begin());
    if (op.completion.before == GuardWords{}) op.completion.before = chunk.before;
    op.completion.after = chunk.after;
    if (!GuardHolds(op.plan.Want(op.want, chunk.index), chunk.before, chunk.after)) {
      return Complete(id, {Code::kStaleRead, "a chunk's guard words are not the lease's"});
    }
    const auto plan = op.plan.plan_chunk(chunk.index);
    const uint64_t bytes = chunk.data->size() * sizeof(uint64_t);
    if (!plan.has_value() || plan->bytes() != bytes || !op.have.insert(chunk.index).second) {
      return Complete(id, {Code::kInternal, "a chunk of the wrong length, or one that was here"});
    }
    op.buffer = chunk.data;
    op.words =
        Words(*plan, {{reinterpret_cast<std::byte*>(op.buffer->data()), bytes, -1}}, regions_);
    op.completion.bytes += bytes;
  } else if (!MoveSome(id, op)) {
    return;
  }
  Later(fabric_.script.pause, id, &FakeTransport::StepUnpack);
}

void FakeTransport::Cancel(OpId op) { End(op, {Code::kCancelled, "cancelled"}); }

// Completes a little later; meanwhile the operation goes on.
void FakeTransport::End(OpId id, Status status) {
  const auto it = ops_.find(id);
  if (it == ops_.end() || std::exchange(it->second.ending, true)) return;
  clock_.CallAfter(fabric_.UpTo(fabric_.script.cancel_delay),
                   [this, id, status] { Complete(id, status); });
}

void FakeTransport::Complete(OpId id, Status status) {
  const auto it = ops_.find(id);
  if (it == ops_.end()) return;
  clock_.Cancel(it->second.deadline);
  if (it->second.kind == Op::Kind::kReceive) receives_.erase(it->second.stream);
  Completion completion = it->second.completion;
  const Done done = std::move(it->second.done);
  ops_.erase(it);
  completion.status = std::move(status);
  done(completion);
}

}  // namespace kvrelay::transport
