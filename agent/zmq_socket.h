// ZeroMQ's handles as owning types, and the settings that every socket of the control plane has.
// Nothing here blocks but the context's destructor.
#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "base/clock.h"
#include "base/status.h"

namespace kvrelay::agent {

// One I/O thread. Outlives its sockets; the destructor waits for their linger time.
class ZmqContext {
 public:
  ZmqContext();
  ~ZmqContext();
  ZmqContext(const ZmqContext&) = delete;
  ZmqContext& operator=(const ZmqContext&) = delete;
  void* get() const { return context_; }

 private:
  void* context_;
};

struct ZmqSocketOptions {
  // A peer that sends nothing for `heartbeat` is pinged; one that then stays silent for `silence`
  // (stopped, or its host gone) counts as disconnected.
  Duration heartbeat = Millis(1000);
  Duration silence = Millis(4000);
  Duration handshake = Millis(3000);  // a connection that is not speaking ZeroMQ by then is closed
  Duration linger{0};                 // how long closing waits for messages on their way out
  int queue_messages = 16384;         // on their way to one peer; more: sends fail at once
};

// One message: its frames, and where it came from.
struct ZmqMessage {
  std::vector<std::string> frames;  // the first kMaxFrames
  size_t frame_count = 0;           // all
  int connection = -1;              // descriptor of the connection; -1 unknown
  std::string peer;                 // "10.0.0.7"; may be empty
};

// A ROUTER or DEALER. Thread: the control thread's, like all that uses it.
class ZmqSocket {
 public:
  static constexpr size_t kMaxFrames = 3;

  static Result<ZmqSocket> Create(std::shared_ptr<ZmqContext> context, int type,
                                  const ZmqSocketOptions& options);
  ZmqSocket(ZmqSocket&& other) noexcept;
  ZmqSocket& operator=(ZmqSocket&& other) noexcept;
  ~ZmqSocket();

  // Returns the endpoint with its real port. kInvalidArgument: "cannot listen on tcp://...: port
  // taken (...)".
  Result<std::string> Bind(const std::string& endpoint);
  // Only starts to connect; the monitor tells how it went.
  Status Connect(const std::string& endpoint);

  // False with errno (zmq_errno) set: EAGAIN queue full, EHOSTUNREACH no such peer (ROUTER).
  [[nodiscard]] bool Send(const std::vector<std::string_view>& frames);
  // Nothing when no message waits.
  std::optional<ZmqMessage> Receive();

  void* get() const { return socket_; }

 private:
  ZmqSocket(std::shared_ptr<ZmqContext> context, void* socket)
      : context_(std::move(context)), socket_(socket) {}
  void Close();

  std::shared_ptr<ZmqContext> context_;
  void* socket_ = nullptr;
};

// What happens to a socket's connections, in order. Closed before its socket.
class ZmqMonitor {
 public:
  struct Event {
    uint16_t what = 0;    // ZMQ_EVENT_*
    int connection = -1;  // descriptor, for the events that have one
  };

  static Result<ZmqMonitor> Create(std::shared_ptr<ZmqContext> context, ZmqSocket& socket,
                                   int events);
  ZmqMonitor(ZmqMonitor&& other) noexcept;
  ZmqMonitor& operator=(ZmqMonitor&& other) noexcept;
  ~ZmqMonitor();

  std::optional<Event> Receive();
  void* get() const { return pair_; }

 private:
  ZmqMonitor(std::shared_ptr<ZmqContext> context, void* watched, void* pair)
      : context_(std::move(context)), watched_(watched), pair_(pair) {}
  void Close();

  std::shared_ptr<ZmqContext> context_;
  void* watched_ = nullptr;
  void* pair_ = nullptr;
};

}  // namespace kvrelay::agent
