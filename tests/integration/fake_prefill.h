// A prefill worker that does not keep its word: it answers a decode daemon like a real one, except
// where a test makes its answers wrong.
#pragma once

#include <atomic>
#include <functional>
#include <memory>
#include <string>
#include <thread>

#include "agent/counters.h"
#include "agent/event_loop.h"
#include "agent/zmq_rpc.h"
#include "proto/messages.h"

namespace kvrelay::integration {

class FakePrefill {
 public:
  // What the answers are made from: those of a real prefill daemon. Its memory is what readers are
  // sent to, but no lease there is ours: even without lies no pull can succeed.
  struct Truth {
    ContentHash model;
    proto::Meta meta;  // of a rank that holds all heads
  };
  // Makes answers wrong; each may be empty. They run on the worker's own thread.
  struct Lies {
    std::function<void(proto::Ticket&)> ticket = {};
    std::function<void(proto::ClaimReply&)> claim = {};
    std::function<void(proto::Meta&)> meta = {};
    // Instead of a good answer's bytes.
    std::function<std::string(proto::Type, std::string)> bytes = {};
  };

  FakePrefill(Truth truth, Lies lies);
  ~FakePrefill();
  FakePrefill(const FakePrefill&) = delete;
  FakePrefill& operator=(const FakePrefill&) = delete;

  const std::string& endpoint() const { return endpoint_; }
  // PREFILL requests that came here.
  int requests() const { return requests_; }

 private:
  void OnPrefill(std::string_view body, const agent::ResponderPtr& responder);
  proto::ClaimReply MakeClaim(const proto::Claim& claim) const;
  void Answer(const agent::ResponderPtr& responder, proto::Type type, std::string body,
              bool more = false) const;

  const Truth truth_;
  const EngineId engine_;
  const Lies lies_;
  agent::Counters counters_;
  agent::EventLoop loop_;
  std::unique_ptr<agent::ZmqRpc> rpc_;
  std::string endpoint_;
  std::atomic<int> requests_{0};
  std::thread thread_;
};

}  // namespace kvrelay::integration
