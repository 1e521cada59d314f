#include "tests/sim/sim_rpc.h"

#include <algorithm>
#include <utility>

#include "proto/codec.h"
#include "tests/sim/kv_model.h"

namespace kvrelay::sim {

Duration Network::Delay(const NetworkFaults& faults) {
  if (world.random.Chance(faults.slow)) {
    return std::chrono::microseconds(world.random.Below(1'000'000));
  }
  return std::chrono::microseconds(world.random.Below(2'000));
}

namespace {

std::string WithWrongTable(const std::string& body) {
  auto claim = *proto::Decode<proto::ClaimReply>(body);
  BlockId& block = claim.tables.front().blocks.front();
  block = (block + 1) % kBlocks;
  return proto::Encode(claim);
}

}  // namespace

// Replies of one call keep their order, as on one connection; a lost one takes the later ones with
// it.
class SimResponder final : public agent::Responder {
 public:
  SimResponder(Network& network, std::shared_ptr<SimRpc::Anchor> caller, agent::Rpc::CallId id,
               std::shared_ptr<bool> cancelled, const NetworkFaults& faults,
               std::function<void(const Result<std::string>&)> watch, bool wrong_table)
      : network_(network),
        caller_(std::move(caller)),
        id_(id),
        cancelled_(std::move(cancelled)),
        faults_(faults),
        watch_(std::move(watch)),
        wrong_table_(wrong_table) {}
  ~SimResponder() override {
    if (!final_) Send(Error(Code::kInternal, "dropped"), false);
  }

  void Reply(std::string body, bool more) override { Send(std::move(body), more); }
  void Fail(const Status& status) override { Send(Error(status), false); }
  bool cancelled() const override { return *cancelled_; }
  void OnCancel(std::function<void()> fn) override {
    // Polled: the callee notices within 50 ms.
    Poll(network_, cancelled_, std::make_shared<std::function<void()>>(std::move(fn)), weak_final_);
  }

 private:
  static void Poll(Network& network, const std::shared_ptr<bool>& cancelled,
                   std::shared_ptr<std::function<void()>> fn, const std::weak_ptr<bool>& open) {
    network.world.Schedule(network.world.Now() + Millis(50), [&network, cancelled, fn, open] {
      if (open.expired()) return;
      if (*cancelled) return (*fn)();
      Poll(network, cancelled, fn, open);
    });
  }

  void Send(Result<std::string> body, bool more) {
    if (final_) return;
    final_ = !more;
    if (final_) open_.reset();
    if (watch_) watch_(body);
    if (wrong_table_ && body.has_value()) body = WithWrongTable(*body);
    lost_ = lost_ || network_.world.random.Chance(faults_.lose);
    if (lost_) return;
    last_ = std::max(last_ + Duration(1), network_.world.Now() + network_.Delay(faults_));
    network_.world.Schedule(last_, [caller = caller_, id = id_, body = std::move(body), more] {
      if (caller->rpc != nullptr) caller->rpc->OnReplyMessage(id, body, more);
    });
  }

  Network& network_;
  std::shared_ptr<SimRpc::Anchor> caller_;
  const agent::Rpc::CallId id_;
  std::shared_ptr<bool> cancelled_;
  const NetworkFaults& faults_;
  const std::function<void(const Result<std::string>&)> watch_;
  const bool wrong_table_;
  std::shared_ptr<bool> open_ = std::make_shared<bool>(true);
  std::weak_ptr<bool> weak_final_ = open_;
  bool final_ = false;
  bool lost_ = false;
  TimePoint last_{};
};

SimRpc::SimRpc(Network& network, Process& process, std::string endpoint, std::string own)
    : network_(network),
      process_(process),
      endpoint_(std::move(endpoint)),
      own_(std::move(own)),
      anchor_(std::make_shared<Anchor>(Anchor{this})) {
  network_.listeners[endpoint_] = this;
}

SimRpc::~SimRpc() { Close(); }

void SimRpc::Close() {
  anchor_->rpc = nullptr;
  const auto calls = std::exchange(calls_, {});  // what they hold may abandon others of them
  for (const auto& [id, call] : calls) *call.cancelled = true;
  const auto it = network_.listeners.find(endpoint_);
  if (it != network_.listeners.end() && it->second == this) network_.listeners.erase(it);
}

agent::Rpc::CallId SimRpc::Call(const std::string& endpoint, proto::Type type, std::string body,
                                TimePoint deadline, OnReply on_reply) {
  World& world = network_.world;
  const CallId id = next_++;
  const NetworkFaults& faults = FaultsTo(endpoint);
  Outgoing& call = calls_[id];
  call.on_reply = std::move(on_reply);
  call.cancelled = std::make_shared<bool>(false);
  call.timer = process_.CallAt(deadline, [this, id] {
    OnReplyMessage(id, Error(Code::kDeadlineExceeded, "no answer in time"), false);
  });
  if (world.random.Chance(faults.lose)) return id;
  // Engines ask for a prefill once and never repeat it by themselves; every other message may
  // arrive twice.
  const bool twice = type != proto::Type::kPrefill && world.random.Chance(faults.repeat);
  const int copies = twice ? 2 : 1;
  for (int copy = 0; copy < copies; ++copy) {
    world.Schedule(world.Now() + network_.Delay(faults),
                   [&network = network_, endpoint, type, body, caller = anchor_, id,
                    cancelled = call.cancelled, &faults] {
                     const auto it = network.listeners.find(endpoint);
                     if (it != network.listeners.end()) {
                       it->second->Deliver(type, body, caller, id, cancelled, faults);
                     } else if (caller->rpc != nullptr && network.world.random.Chance(0.7)) {
                       caller->rpc->OnReplyMessage(
                           id, Error(Code::kPeerUnreachable, endpoint + " refused"), false);
                     }
                   });
  }
  return id;
}

void SimRpc::Abandon(CallId id) {
  const auto it = calls_.find(id);
  if (it == calls_.end()) return;
  process_.Cancel(it->second.timer);
  *it->second.cancelled = true;
  calls_.erase(it);
}

void SimRpc::Deliver(proto::Type type, const std::string& body,
                     const std::shared_ptr<Anchor>& caller, CallId id,
                     const std::shared_ptr<bool>& cancelled, const NetworkFaults& faults) {
  std::function<void(const Result<std::string>&)> watch;
  const auto watcher = watchers_.find(type);
  if (watcher != watchers_.end()) {
    watch = [here = anchor_, watcher, body](const Result<std::string>& reply) {
      if (here->rpc != nullptr) watcher->second(body, &reply);
    };
  }
  const bool wrong_table =
      type == proto::Type::kClaim && network_.world.random.Chance(faults.wrong_table);
  auto responder = std::make_shared<SimResponder>(network_, caller, id, cancelled, faults,
                                                  std::move(watch), wrong_table);
  const auto handler = handlers_.find(type);
  if (handler == handlers_.end()) {
    return responder->Fail({Code::kInvalidArgument, "no handler"});
  }
  handler->second(body, std::move(responder));
  if (watcher != watchers_.end()) watcher->second(body, nullptr);
}

void SimRpc::OnReplyMessage(CallId id, Result<std::string> body, bool more) {
  const auto it = calls_.find(id);
  if (it == calls_.end()) return;
  if (more) {
    const OnReply on_reply = it->second.on_reply;
    return on_reply(std::move(body), true);
  }
  const Outgoing call = std::move(it->second);
  calls_.erase(it);
  process_.Cancel(call.timer);
  if (!body.has_value() && body.error().code() == Code::kDeadlineExceeded) *call.cancelled = true;
  call.on_reply(std::move(body), false);
}

}  // namespace kvrelay::sim
