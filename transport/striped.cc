#include "transport/striped.h"

#include <algorithm>
#include <functional>
#include <map>
#include <thread>
#include <utility>

#include "transport/control_side.h"

namespace kvrelay::transport {
namespace {

constexpr std::string_view kStripedMagic = "kvs1";
constexpr size_t kLengthBytes = 4;

void PutLength(std::string& out, size_t length) {
  for (int shift = 0; shift < 32; shift += 8) out += static_cast<char>(length >> shift & 0xff);
}

size_t TakeLength(std::string_view& in) {
  size_t length = 0;
  for (size_t i = 0; i < kLengthBytes; ++i)
    length |= size_t{static_cast<unsigned char>(in[i])} << (8 * i);
  in.remove_prefix(kLengthBytes);
  return length;
}

// A rail keeps one thread of either side busy, and the other side is often on the same host: two
// rails there use four processors.
uint32_t RailsFor(uint32_t processors) { return processors >= 4 ? 2 : 1; }

// An owner that we read from, over all rails.
struct Peer {
  std::vector<PeerHandle> rails;                      // 0: not connected
  size_t connecting = 0;                              // rails that have not answered
  size_t receives = 0;                                // in flight
  Status failure;                                     // of the first rail that failed
  std::function<void(Result<PeerHandle>)> connected;  // null once it was called
  std::function<void()> on_death;
};

// One stream, on either side.
struct Op {
  struct Stripe {
    Transport* rail = nullptr;
    OpId id = 0;  // 0: completed
  };
  PeerHandle peer = 0;  // kReceive only
  std::vector<Stripe> stripes;
  size_t left = 0;
  uint32_t last_stripe = 0;  // the one with the stream's last chunk
  Completion completion;
  Done done;
};

// What the rails' callbacks refer to; the last of them come after the transport's end. Control
// thread only.
struct Table {
  std::vector<Transport*> rails;  // empty after the transport's end
  std::map<PeerHandle, Peer> peers;
  std::map<OpId, Op> ops;

  void Cancel(const Op& op) const;
  void OnStripe(OpId id, uint32_t stripe, const Completion& completion);
  void OnConnected(PeerHandle handle, size_t rail, const Result<PeerHandle>& result);
  void OnDeath(PeerHandle handle);
  void Disconnect(const Peer& peer) const;
  // Tells of a death once nothing of the peer is in flight any more.
  void Bury(PeerHandle handle);
};

void Table::Cancel(const Op& op) const {
  if (rails.empty()) return;
  for (const Op::Stripe& stripe : op.stripes) {
    if (stripe.id != 0) stripe.rail->Cancel(stripe.id);
  }
}

void Table::OnStripe(OpId id, uint32_t stripe, const Completion& completion) {
  const auto it = ops.find(id);
  Op& op = it->second;
  op.stripes[stripe].id = 0;
  op.completion.bytes += completion.bytes;
  if (stripe == 0) op.completion.before = completion.before;
  if (stripe == op.last_stripe) op.completion.after = completion.after;
  if (!completion.status.ok() && op.completion.status.ok()) {
    op.completion.status = completion.status;
    Cancel(op);
  }
  if (--op.left > 0) return;
  const Op ended = std::move(op);
  ops.erase(it);
  ended.done(ended.completion);
  if (const auto peer = peers.find(ended.peer); peer != peers.end()) {
    --peer->second.receives;
    Bury(ended.peer);
  }
}

void Table::OnConnected(PeerHandle handle, size_t rail, const Result<PeerHandle>& result) {
  const auto it = peers.find(handle);
  Peer& peer = it->second;
  if (result.has_value()) {
    peer.rails[rail] = *result;
  } else if (peer.failure.ok()) {
    peer.failure = result.error();
  }
  if (--peer.connecting > 0) return;
  const auto connected = std::exchange(peer.connected, nullptr);
  if (peer.failure.ok()) return connected(handle);
  Disconnect(peer);
  const Status failure = std::move(peer.failure);
  peers.erase(it);
  connected(Error(failure));
}

void Table::OnDeath(PeerHandle handle) {
  const auto it = peers.find(handle);
  if (it == peers.end() || !it->second.failure.ok()) return;
  it->second.failure = Status(Code::kPeerUnreachable, "the connection is lost");
  if (it->second.connecting > 0) return;  // OnConnected ends it
  Disconnect(it->second);
  Bury(handle);
}

void Table::Disconnect(const Peer& peer) const {
  for (size_t i = 0; i < rails.size(); ++i) {
    if (peer.rails[i] != 0) rails[i]->Disconnect(peer.rails[i]);
  }
}

void Table::Bury(PeerHandle handle) {
  const auto it = peers.find(handle);
  if (it->second.failure.ok() || it->second.receives > 0) return;
  const auto on_death = std::move(it->second.on_death);
  peers.erase(it);
  on_death();
}

class StripedTransport final : public Transport {
 public:
  StripedTransport(std::vector<std::unique_ptr<Transport>> rails, Executor executor)
      : control_(std::move(executor)), rails_(std::move(rails)) {
    StripedAddress address;
    for (const auto& rail : rails_) {
      address.rails.push_back(rail->LocalAddress());
      table_->rails.push_back(rail.get());
    }
    address_ = address.Encode();
  }
  ~StripedTransport() override { table_->rails.clear(); }

  std::string_view name() const override { return rails_.front()->name(); }
  Style style() const override { return Style::kPacked; }
  Address LocalAddress() const override { return address_; }
  std::string lanes() const override { return rails_.front()->lanes(); }
  Counters counters() const override;

  void Connect(PeerSpec spec, TimePoint deadline, std::function<void(Result<PeerHandle>)> connected,
               std::function<void()> on_death) override;
  void Disconnect(PeerHandle handle) override;
  OpId Read(PeerHandle, NextPortion, GuardRef, Terms, Done done) override {
    return control_.RefuseStart(
        std::move(done),
        Status(Code::kInvalidArgument, std::string(name()) + " has no one-sided reads"));
  }
  OpId StartPackedReceive(PeerHandle handle, StreamId stream, StreamPlan plan,
                          GuardExpectation want, Terms terms, Done done) override;
  OpId StartPackedSend(PeerSpec reader, StreamId stream, StreamPlan plan, const LeaseRecord* record,
                       GuardExpectation want, Terms terms, Done done) override;
  void Cancel(OpId id) override {
    if (const auto it = table_->ops.find(id); it != table_->ops.end()) table_->Cancel(it->second);
  }

 private:
  // Starts `stripe` of a stream as an operation of `rail`.
  using StartStripe =
      std::function<OpId(Transport& rail, uint32_t stripe, StreamPlan plan, Done done)>;

  OpId StartStripes(PeerHandle peer, const StreamPlan& plan, size_t readers_rails, Done done,
                    const StartStripe& start);

  ControlSide control_;
  Address address_;
  const std::shared_ptr<Table> table_ = std::make_shared<Table>();
  const std::vector<std::unique_ptr<Transport>> rails_;
};

Counters StripedTransport::counters() const {
  Counters sums = rails_.front()->counters();
  for (size_t rail = 1; rail < rails_.size(); ++rail) {
    const Counters more = rails_[rail]->counters();
    for (size_t i = 0; i < sums.size(); ++i) sums[i].second += more[i].second;
  }
  return sums;
}

void StripedTransport::Connect(PeerSpec spec, TimePoint deadline,
                               std::function<void(Result<PeerHandle>)> connected,
                               std::function<void()> on_death) {
  const Result<StripedAddress> address = StripedAddress::Decode(spec.address);
  if (!address.has_value()) {
    const PeerHandle refused = control_.Watch(std::move(connected), std::move(on_death));
    return control_.Lost(refused, address.error());
  }
  const PeerHandle handle = control_.NextId();
  table_->peers[handle] = {.rails = std::vector<PeerHandle>(rails_.size()),
                           .connecting = rails_.size(),
                           .receives = 0,
                           .failure = {},
                           .connected = std::move(connected),
                           .on_death = std::move(on_death)};
  for (size_t i = 0; i < rails_.size(); ++i) {
    spec.address = address->rails[i % address->rails.size()];
    rails_[i]->Connect(
        spec, deadline,
        [table = table_, handle, i](const Result<PeerHandle>& result) {
          table->OnConnected(handle, i, result);
        },
        [table = table_, handle] { table->OnDeath(handle); });
  }
}

void StripedTransport::Disconnect(PeerHandle handle) {
  const auto it = table_->peers.find(handle);
  if (it == table_->peers.end()) return;
  table_->Disconnect(it->second);
  table_->peers.erase(it);
}

OpId StripedTransport::StartPackedReceive(PeerHandle handle, StreamId stream, StreamPlan plan,
                                          GuardExpectation want, Terms terms, Done done) {
  const auto it = table_->peers.find(handle);
  if (it == table_->peers.end() || !it->second.failure.ok()) {
    return control_.RefuseStart(
        std::move(done), Status(Code::kPeerUnreachable, "the peer is not connected any more"));
  }
  ++it->second.receives;
  return StartStripes(handle, plan, rails_.size(), std::move(done),
                      [&](Transport& rail, uint32_t stripe, StreamPlan part, Done part_done) {
                        return rail.StartPackedReceive(it->second.rails[stripe], stream,
                                                       std::move(part), want, terms,
                                                       std::move(part_done));
                      });
}

OpId StripedTransport::StartPackedSend(PeerSpec reader, StreamId stream, StreamPlan plan,
                                       const LeaseRecord* record, GuardExpectation want,
                                       Terms terms, Done done) {
  const Result<StripedAddress> address = StripedAddress::Decode(reader.address);
  if (!address.has_value())
    return control_.RefuseStart(std::move(done), address.error().Wrap(reader.name));
  return StartStripes(0, plan, address->rails.size(), std::move(done),
                      [&](Transport& rail, uint32_t stripe, StreamPlan part, Done part_done) {
                        PeerSpec spec = reader;
                        spec.address = address->rails[stripe];
                        return rail.StartPackedSend(std::move(spec), stream, std::move(part),
                                                    record, want, terms, std::move(part_done));
                      });
}

OpId StripedTransport::StartStripes(PeerHandle peer, const StreamPlan& plan, size_t readers_rails,
                                    Done done, const StartStripe& start) {
  const OpId id = control_.NextId();
  // A stream without chunks is refused by the rail.
  const auto stripes = static_cast<uint32_t>(std::clamp<size_t>(plan.chunks, 1, readers_rails));
  Op& op = table_->ops[id];
  op.peer = peer;
  op.left = stripes;
  op.last_stripe = plan.chunks == 0 ? 0 : (plan.chunks - 1) % stripes;
  op.done = std::move(done);
  for (uint32_t i = 0; i < stripes; ++i) {
    Transport* rail = rails_[i % rails_.size()].get();
    op.stripes.push_back({rail, start(*rail, i, StripeOf(plan, i, stripes),
                                      [table = table_, id, i](const Completion& completion) {
                                        table->OnStripe(id, i, completion);
                                      })});
  }
  return id;
}

}  // namespace

// magic, number of rails, then length and bytes of each.
Address StripedAddress::Encode() const {
  Address out(kStripedMagic);
  PutLength(out, rails.size());
  for (const Address& rail : rails) {
    PutLength(out, rail.size());
    out += rail;
  }
  return out;
}

Result<StripedAddress> StripedAddress::Decode(std::string_view bytes) {
  const Status bad(Code::kInvalidArgument, "not an address of a striped transport");
  if (!bytes.starts_with(kStripedMagic)) return Error(bad);
  bytes.remove_prefix(kStripedMagic.size());
  if (bytes.size() < kLengthBytes) return Error(bad);
  const size_t count = TakeLength(bytes);
  if (count == 0 || count > kMaxRails) return Error(bad);
  StripedAddress address;
  for (size_t i = 0; i < count; ++i) {
    if (bytes.size() < kLengthBytes) return Error(bad);
    const size_t length = TakeLength(bytes);
    if (length > bytes.size()) return Error(bad);
    address.rails.emplace_back(bytes.substr(0, length));
    bytes.remove_prefix(length);
  }
  if (!bytes.empty()) return Error(bad);
  return address;
}

StreamPlan StripeOf(const StreamPlan& plan, uint32_t rail, uint32_t rails) {
  StreamPlan stripe = plan;
  stripe.chunks = plan.chunks <= rail ? 0 : (plan.chunks - rail - 1) / rails + 1;
  if (plan.plan_chunk) {
    stripe.plan_chunk = [whole = plan.plan_chunk, rail, rails](uint32_t chunk) {
      return whole(rail + chunk * rails);
    };
  }
  if (plan.extent_of) {
    stripe.extent_of = [whole = plan.extent_of, rail, rails](uint32_t chunk) {
      return whole(rail + chunk * rails);
    };
  }
  return stripe;
}

std::unique_ptr<Transport> Stripe(std::vector<std::unique_ptr<Transport>> rails,
                                  Executor executor) {
  return std::make_unique<StripedTransport>(std::move(rails), std::move(executor));
}

Result<std::unique_ptr<Transport>> CreateStriped(
    const Options& options, Result<std::unique_ptr<Transport>> (*create_rail)(Options)) {
  const uint32_t count = std::min<uint32_t>(
      options.rails == 0 ? RailsFor(std::thread::hardware_concurrency()) : options.rails,
      StripedAddress::kMaxRails);
  std::vector<std::unique_ptr<Transport>> rails;
  for (uint32_t i = 0; i < count; ++i) {
    KVRELAY_ASSIGN_OR_RETURN(std::unique_ptr<Transport> rail, create_rail(options));
    rails.push_back(std::move(rail));
  }
  return Stripe(std::move(rails), options.executor);
}

}  // namespace kvrelay::transport
