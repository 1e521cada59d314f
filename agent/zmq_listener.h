// The answering half of ZmqRpc: one ROUTER, the requests in progress, and who is still there to
// hear their answers.
//
// Requests come as [identity][empty][envelope] and are answered alike, so that a plain REQ socket
// can call. Nobody can end the listener: what is not a good request costs its sender an error (when
// it can be answered) and us a counter and a log line.
#pragma once

#include <array>
#include <cstdint>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <unordered_map>
#include <unordered_set>
#include <utility>

#include "agent/counters.h"
#include "agent/event_loop.h"
#include "agent/rpc.h"
#include "proto/envelope.h"
#include "transport/zap_handler.h"
#include "transport/zmq_socket.h"

namespace kvrelay::agent {

// Control thread. Responders may outlive it; they answer nobody then.
class ZmqListener : public std::enable_shared_from_this<ZmqListener> {
 public:
  // More requests in progress than this are answered kOverloaded.
  static constexpr size_t kMaxRequests = 16384;

  // `curve`: who may connect; null: anybody, without a key.
  static Result<std::shared_ptr<ZmqListener>> Create(
      std::shared_ptr<transport::ZmqContext> context, EventLoop& loop, Counters& counters,
      const std::string& endpoint, const transport::ZmqSocketOptions& options,
      std::shared_ptr<const transport::CurveIdentity> curve);
  ~ZmqListener();
  ZmqListener(const ZmqListener&) = delete;
  ZmqListener& operator=(const ZmqListener&) = delete;

  const std::string& endpoint() const { return endpoint_; }
  void Handle(proto::Type type, Rpc::Handler handler);

 private:
  class Request;
  using RequestKey = std::pair<std::string, uint64_t>;  // identity of the connection, call id

  ZmqListener(EventLoop& loop, Counters& counters, transport::ZmqSocket socket,
              transport::ZmqMonitor monitor, std::string endpoint,
              std::optional<transport::ZapHandler> zap);
  void StartWatching();
  void OnReadable();
  void OnConnectionEvents();
  void ServeZap();
  void OnMessage(const transport::ZmqMessage& message);
  void Serve(const transport::ZmqMessage& message, const proto::Envelope& envelope);
  void Reject(const transport::ZmqMessage& message, const proto::BadEnvelope& bad);

  enum class Sent { kYes, kPeerGone, kQueueFull };
  Sent Send(const std::string& identity, const proto::Envelope& envelope);
  Sent SendError(const std::string& identity, uint64_t id, const Status& status);
  // The request's caller is gone. Unknown keys are ignored.
  void CancelRequest(const RequestKey& key);
  void Forget(const Request& request);

  EventLoop& loop_;
  Counters& counters_;
  transport::ZmqSocket socket_;
  transport::ZmqMonitor monitor_;
  std::optional<transport::ZapHandler> zap_;  // with keys
  const std::string endpoint_;
  EventLoop::WatchId socket_watch_ = 0;
  EventLoop::WatchId monitor_watch_ = 0;
  EventLoop::WatchId zap_watch_ = 0;

  std::array<Rpc::Handler, 256> handlers_;  // by proto::Type
  // In progress: neither finally answered nor cancelled. Each Request takes itself out.
  std::map<RequestKey, Request*> requests_;
  // Open connections by descriptor, with the keys of their requests in progress.
  std::unordered_map<int, std::unordered_set<Request*>> connections_;
};

}  // namespace kvrelay::agent
