// The control network of a schedule: messages are delayed, reordered, repeated and lost; peers
// refuse or stay silent.
#pragma once

#include <functional>
#include <map>
#include <memory>
#include <string>
#include <string_view>

#include "agent/rpc.h"
#include "tests/sim/world.h"

namespace kvrelay::sim {

struct NetworkFaults {
  double lose = 0;         // a request, or a reply (with all later ones of the same call)
  double repeat = 0;       // a request arrives twice
  double slow = 0;         // takes up to a second instead of up to 2 ms
  double wrong_table = 0;  // a claim's answer names another block
};

class SimRpc;

// Who listens where.
class Network {
 public:
  explicit Network(World& world) : world(world) {}
  World& world;
  NetworkFaults between;  // engines
  NetworkFaults inside;   // one: a leader and its ranks
  std::map<std::string, SimRpc*> listeners;
  Duration Delay(const NetworkFaults& faults);
};

class SimRpc final : public agent::Rpc {
 public:
  // `own`: endpoints of the same engine start with this text.
  SimRpc(Network& network, Process& process, std::string endpoint, std::string own);
  ~SimRpc() override;
  // The process died: nobody listens, no answer arrives.
  void Close();

  void Handle(proto::Type type, Handler handler) override { handlers_[type] = std::move(handler); }
  CallId Call(const std::string& endpoint, proto::Type type, std::string body, TimePoint deadline,
              OnReply on_reply) override;
  void Abandon(CallId id) override;
  const std::string& endpoint() const { return endpoint_; }

  // Sees what this listener is asked and answers. `reply` is null when the handler has just run
  // (and may answer later); afterwards, or before, each answer is seen as it leaves.
  using Watcher = std::function<void(std::string_view request, const Result<std::string>* reply)>;
  void Watch(proto::Type type, Watcher watcher) { watchers_[type] = std::move(watcher); }

 private:
  friend class SimResponder;
  struct Outgoing {
    OnReply on_reply;
    Clock::TimerId timer = 0;
    std::shared_ptr<bool> cancelled;  // seen by the callee a little later
  };
  // Survives the rpc: what late messages and answers check.
  struct Anchor {
    SimRpc* rpc = nullptr;
  };

  void Deliver(proto::Type type, const std::string& body, const std::shared_ptr<Anchor>& caller,
               CallId id, const std::shared_ptr<bool>& cancelled, const NetworkFaults& faults);
  const NetworkFaults& FaultsTo(const std::string& endpoint) const {
    return endpoint.starts_with(own_) ? network_.inside : network_.between;
  }
  void OnReplyMessage(CallId id, Result<std::string> body, bool more);

  Network& network_;
  Process& process_;
  const std::string endpoint_;
  const std::string own_;
  std::shared_ptr<Anchor> anchor_;
  std::map<proto::Type, Handler> handlers_;
  std::map<proto::Type, Watcher> watchers_;
  CallId next_ = 1;
  std::map<CallId, Outgoing> calls_;
};

}  // namespace kvrelay::sim
