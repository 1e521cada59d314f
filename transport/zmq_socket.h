// ZeroMQ's handles as owning types, and the settings that every socket of ours has: those of calls
// between agents, and those of packed streams.
// Nothing here blocks but the context's destructor.
#pragma once

#include <zmq.h>

#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "base/clock.h"
#include "base/status.h"
#include "transport/curve.h"

namespace kvrelay::transport {

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
  // A connection that carries nothing for `heartbeat` is pinged by the side that dialed; after
  // `silence` more (the other side stopped, or its host gone) each side counts it as broken.
  Duration heartbeat = Millis(1000);
  Duration silence = Millis(4000);
  Duration handshake = Millis(3000);  // a connection that is not speaking ZeroMQ by then is closed
  Duration linger{0};                 // how long closing waits for messages on their way out
  int queue_messages = 16384;         // on their way to one peer; more: sends fail at once
  // Messages per connection that wait for a listener; then TCP holds the sender back. Times
  // max_bytes: what a flood costs. The side that dialed takes all that it asked for.
  int receive_queue = 64;
  int64_t max_bytes = 8 << 20;  // of a frame; a longer one closes its connection before it is read
};

// A part of a message.
class ZmqFrame {
 public:
  ZmqFrame() { zmq_msg_init(&message_); }
  ~ZmqFrame() { zmq_msg_close(&message_); }
  ZmqFrame(const ZmqFrame&) = delete;
  ZmqFrame& operator=(const ZmqFrame&) = delete;
  zmq_msg_t* get() { return &message_; }
  std::string_view view() {
    return {static_cast<const char*>(zmq_msg_data(&message_)), zmq_msg_size(&message_)};
  }
  bool more() { return zmq_msg_more(&message_) != 0; }

 private:
  zmq_msg_t message_;
};

// One message: its frames, and where it came from.
struct ZmqMessage {
  std::vector<std::string> frames;  // the first kMaxFrames
  size_t frame_count = 0;           // all
  int connection = -1;              // descriptor of the connection; -1 unknown
  std::string peer;                 // "10.0.0.7"; may be empty
};

// One thread at a time.
class ZmqSocket {
 public:
  static constexpr size_t kMaxFrames = 3;

  static Result<ZmqSocket> Create(std::shared_ptr<ZmqContext> context, int type,
                                  const ZmqSocketOptions& options);
  ZmqSocket(ZmqSocket&& other) noexcept;
  ZmqSocket& operator=(ZmqSocket&& other) noexcept;
  ~ZmqSocket();

  // Before Bind: clients need our public key, and one of their own that the context's ZapHandler
  // allows. Without a handler any key will do, if anybody is allowed.
  Status BeCurveServer(const CurveIdentity& identity);
  // Before Connect: the server has this key.
  Status BeCurveClient(const CurveIdentity& identity, const CurveKey& server);

  // Returns the endpoint with its real port. kInvalidArgument: "cannot listen on tcp://...: port
  // taken (...)".
  Result<std::string> Bind(const std::string& endpoint);
  // Only starts to connect; the monitor tells how it went.
  Status Connect(const std::string& endpoint);

  // False with errno (zmq_errno) set: EAGAIN queue full, EHOSTUNREACH no such peer (ROUTER).
  [[nodiscard]] bool Send(const std::vector<std::string_view>& frames);
  // Nothing when no message waits. Of its frames the first `max_frames`.
  std::optional<ZmqMessage> Receive(size_t max_frames = kMaxFrames);
  // A frame without a copy of it. False when no message waits.
  [[nodiscard]] bool ReceiveFrame(ZmqFrame& frame);
  // Readable when something may have happened since Receive, ReceiveFrame or HasMessage said that
  // no message waits. Owned by the socket.
  int fd() const;
  bool HasMessage() const;

  void* get() const { return socket_; }

 private:
  ZmqSocket(std::shared_ptr<ZmqContext> context, void* socket, const ZmqSocketOptions& options)
      : context_(std::move(context)), socket_(socket), options_(options) {}
  void Close();

  std::shared_ptr<ZmqContext> context_;
  void* socket_ = nullptr;
  ZmqSocketOptions options_;
};

// What happens to a socket's connections, in order. Closed before its socket.
class ZmqMonitor {
 public:
  struct Event {
    uint16_t what = 0;  // ZMQ_EVENT_*
    // Accepted, disconnected: the connection's descriptor. A handshake that failed: why
    // (ZMQ_PROTOCOL_ERROR_*).
    int value = -1;
  };

  static Result<ZmqMonitor> Create(std::shared_ptr<ZmqContext> context, ZmqSocket& socket,
                                   int events);
  ZmqMonitor(ZmqMonitor&& other) noexcept;
  ZmqMonitor& operator=(ZmqMonitor&& other) noexcept;
  ~ZmqMonitor();

  std::optional<Event> Receive();
  // Readable when something may have happened since Receive returned nothing.
  int fd() const;
  void* get() const { return pair_; }

 private:
  ZmqMonitor(std::shared_ptr<ZmqContext> context, void* watched, void* pair)
      : context_(std::move(context)), watched_(watched), pair_(pair) {}
  void Close();

  std::shared_ptr<ZmqContext> context_;
  void* watched_ = nullptr;
  void* pair_ = nullptr;
};

}  // namespace kvrelay::transport
