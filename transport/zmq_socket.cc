#include "transport/zmq_socket.h"

#include <glog/logging.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <cstring>
#include <span>
#include <utility>

namespace kvrelay::transport {
namespace {

// A DEALER has two PAIR sockets for its monitor; the default of 1023 sockets would do for 340
// peers.
constexpr int kMaxSockets = 16384;
// We never let ZeroMQ reconnect by itself (see agent/zmq_dialer.h): a new try is a new socket.
constexpr int kNeverReconnectMs = 3600 * 1000;
// Unacknowledged bytes on a dead network break the connection after this.
constexpr int kTcpRetransmitMs = 10'000;
// The kernel's question to who is silent and does not ping: after 15 s, and then twice more.
constexpr int kKeepaliveIdleSeconds = 15;
constexpr int kKeepaliveIntervalSeconds = 5;
constexpr int kKeepaliveProbes = 3;

int Ms(Duration d) {
  return static_cast<int>(std::chrono::duration_cast<std::chrono::milliseconds>(d).count());
}

std::string LastError() { return zmq_strerror(zmq_errno()); }

struct Setting {
  int name;
  int value;
};
// Those of a binding or connecting count for what is bound or connected afterwards.
Status Apply(void* socket, std::span<const Setting> settings) {
  for (const Setting& setting : settings) {
    if (zmq_setsockopt(socket, setting.name, &setting.value, sizeof(setting.value)) != 0) {
      return {Code::kInternal, "ZeroMQ refuses option " + std::to_string(setting.name) + " = " +
                                   std::to_string(setting.value) + ": " + LastError()};
    }
  }
  return Status::Ok();
}

// False when no message waits.
bool ReceiveFrom(void* socket, ZmqFrame& frame) {
  int rc;
  do {
    rc = zmq_msg_recv(frame.get(), socket, ZMQ_DONTWAIT);
  } while (rc < 0 && zmq_errno() == EINTR);
  return rc >= 0;
}

int FdOf(void* socket) {
  int fd = -1;
  size_t size = sizeof(fd);
  zmq_getsockopt(socket, ZMQ_FD, &fd, &size);
  return fd;
}

}  // namespace

ZmqContext::ZmqContext() : context_(zmq_ctx_new()) {
  CHECK(context_ != nullptr) << "zmq_ctx_new: " << LastError();
  zmq_ctx_set(context_, ZMQ_MAX_SOCKETS, kMaxSockets);
}

ZmqContext::~ZmqContext() {
  while (zmq_ctx_term(context_) != 0 && zmq_errno() == EINTR) {
  }
}

Result<ZmqSocket> ZmqSocket::Create(std::shared_ptr<ZmqContext> context, int type,
                                    const ZmqSocketOptions& options) {
  void* const raw = zmq_socket(context->get(), type);
  if (raw == nullptr) {
    return Error(Code::kResourceExhausted, "cannot create a ZeroMQ socket: " + LastError());
  }
  ZmqSocket socket(std::move(context), raw, options);
  std::vector<Setting> settings = {
      {ZMQ_LINGER, Ms(options.linger)},           {ZMQ_SNDHWM, options.queue_messages},
      {ZMQ_HANDSHAKE_IVL, Ms(options.handshake)}, {ZMQ_CONNECT_TIMEOUT, Ms(options.handshake)},
      {ZMQ_RECONNECT_IVL, kNeverReconnectMs},     {ZMQ_TCP_MAXRT, kTcpRetransmitMs},
  };
  if (type == ZMQ_ROUTER) settings.push_back({ZMQ_ROUTER_MANDATORY, 1});
  KVRELAY_RETURN_IF_ERROR(Apply(raw, settings));
  if (zmq_setsockopt(raw, ZMQ_MAXMSGSIZE, &options.max_bytes, sizeof(options.max_bytes)) != 0) {
    return Error(Code::kInternal, "ZeroMQ refuses ZMQ_MAXMSGSIZE: " + LastError());
  }
  return socket;
}

ZmqSocket::ZmqSocket(ZmqSocket&& other) noexcept
    : context_(std::move(other.context_)),
      socket_(std::exchange(other.socket_, nullptr)),
      options_(other.options_) {}

ZmqSocket& ZmqSocket::operator=(ZmqSocket&& other) noexcept {
  if (this != &other) {
    Close();
    context_ = std::move(other.context_);
    socket_ = std::exchange(other.socket_, nullptr);
    options_ = other.options_;
  }
  return *this;
}

ZmqSocket::~ZmqSocket() { Close(); }

void ZmqSocket::Close() {
  if (socket_ != nullptr) zmq_close(std::exchange(socket_, nullptr));
}

Status ZmqSocket::BeCurveServer(const CurveIdentity& identity) {
  const int on = 1;
  constexpr std::string_view kDomain = "kvrelay";  // with one, nobody enters without a ZapHandler
  if (zmq_setsockopt(socket_, ZMQ_CURVE_SERVER, &on, sizeof(on)) != 0 ||
      zmq_setsockopt(socket_, ZMQ_CURVE_SECRETKEY, identity.secret_key.data(),
                     identity.secret_key.size()) != 0 ||
      (!identity.anybody &&
       zmq_setsockopt(socket_, ZMQ_ZAP_DOMAIN, kDomain.data(), kDomain.size()) != 0)) {
    return Error(Code::kInternal, "ZeroMQ refuses our key: " + LastError());
  }
  return Status::Ok();
}

Status ZmqSocket::BeCurveClient(const CurveIdentity& identity, const CurveKey& server) {
  if (zmq_setsockopt(socket_, ZMQ_CURVE_SERVERKEY, server.data(), server.size()) != 0 ||
      zmq_setsockopt(socket_, ZMQ_CURVE_PUBLICKEY, identity.public_key.data(),
                     identity.public_key.size()) != 0 ||
      zmq_setsockopt(socket_, ZMQ_CURVE_SECRETKEY, identity.secret_key.data(),
                     identity.secret_key.size()) != 0) {
    return Error(Code::kInternal, "ZeroMQ refuses a key: " + LastError());
  }
  return Status::Ok();
}

Result<std::string> ZmqSocket::Bind(const std::string& endpoint) {
  if (endpoint.find('[') != std::string::npos) {
    const int on = 1;
    zmq_setsockopt(socket_, ZMQ_IPV6, &on, sizeof(on));
  }
  // No pings from here: libzmq (4.3) aborts the process when one is due on a connection that is
  // broken while TCP holds its sender back. The other side pings, and says when to give up.
  const std::array settings = {Setting{ZMQ_RCVHWM, options_.receive_queue},
                               Setting{ZMQ_TCP_KEEPALIVE, 1},
                               Setting{ZMQ_TCP_KEEPALIVE_IDLE, kKeepaliveIdleSeconds},
                               Setting{ZMQ_TCP_KEEPALIVE_INTVL, kKeepaliveIntervalSeconds},
                               Setting{ZMQ_TCP_KEEPALIVE_CNT, kKeepaliveProbes}};
  KVRELAY_RETURN_IF_ERROR(Apply(socket_, settings));
  if (zmq_bind(socket_, endpoint.c_str()) != 0) {
    const bool taken = zmq_errno() == EADDRINUSE;
    return Error(Code::kInvalidArgument,
                 "cannot listen on " + endpoint + ": " +
                     (taken ? "port taken (" + LastError() + ")" : LastError()));
  }
  char real[512];
  size_t size = sizeof(real);
  if (zmq_getsockopt(socket_, ZMQ_LAST_ENDPOINT, real, &size) != 0) {
    return Error(Code::kInternal, "cannot learn the port of " + endpoint + ": " + LastError());
  }
  return std::string(real);
}

Status ZmqSocket::Connect(const std::string& endpoint) {
  if (endpoint.find('[') != std::string::npos) {
    const int on = 1;
    zmq_setsockopt(socket_, ZMQ_IPV6, &on, sizeof(on));
  }
  const std::array settings = {
      Setting{ZMQ_RCVHWM, 0},  // never held back: see Bind
      Setting{ZMQ_HEARTBEAT_IVL, Ms(options_.heartbeat)},
      Setting{ZMQ_HEARTBEAT_TIMEOUT, Ms(options_.silence)},
      Setting{ZMQ_HEARTBEAT_TTL, Ms(options_.heartbeat + options_.silence)}};
  KVRELAY_RETURN_IF_ERROR(Apply(socket_, settings));
  if (zmq_connect(socket_, endpoint.c_str()) != 0) {
    return {Code::kInvalidArgument, "cannot connect to '" + endpoint + "': " + LastError()};
  }
  return Status::Ok();
}

bool ZmqSocket::Send(const std::vector<std::string_view>& frames) {
  for (size_t i = 0; i < frames.size(); ++i) {
    const int flags = ZMQ_DONTWAIT | (i + 1 < frames.size() ? ZMQ_SNDMORE : 0);
    int rc;
    do {
      rc = zmq_send(socket_, frames[i].data(), frames[i].size(), flags);
    } while (rc < 0 && zmq_errno() == EINTR);
    // Only the first frame can fail: it decides about the whole message.
    if (rc < 0) return false;
  }
  return true;
}

bool ZmqSocket::ReceiveFrame(ZmqFrame& frame) { return ReceiveFrom(socket_, frame); }

int ZmqSocket::fd() const { return FdOf(socket_); }

bool ZmqSocket::HasMessage() const {
  int events = 0;
  size_t size = sizeof(events);
  return zmq_getsockopt(socket_, ZMQ_EVENTS, &events, &size) == 0 && (events & ZMQ_POLLIN) != 0;
}

std::optional<ZmqMessage> ZmqSocket::Receive(size_t max_frames) {
  ZmqMessage message;
  for (;;) {
    ZmqFrame frame;
    // A message comes whole, so there is none only before its first frame.
    if (!ReceiveFrom(socket_, frame)) return std::nullopt;
    if (message.frame_count++ < max_frames) message.frames.emplace_back(frame.view());
    const int connection = zmq_msg_get(frame.get(), ZMQ_SRCFD);
    if (connection >= 0) message.connection = connection;
    if (message.peer.empty()) {
      const char* const peer = zmq_msg_gets(frame.get(), "Peer-Address");
      if (peer != nullptr) message.peer = peer;
    }
    if (!frame.more()) return message;
  }
}

Result<ZmqMonitor> ZmqMonitor::Create(std::shared_ptr<ZmqContext> context, ZmqSocket& socket,
                                      int events) {
  // The address is private to the context; a socket's pointer is its own while it lives.
  const std::string address =
      "inproc://monitor-" + std::to_string(reinterpret_cast<uintptr_t>(socket.get()));
  if (zmq_socket_monitor(socket.get(), address.c_str(), events) != 0) {
    return Error(Code::kResourceExhausted, "cannot watch a ZeroMQ socket: " + LastError());
  }
  void* const pair = zmq_socket(context->get(), ZMQ_PAIR);
  if (pair == nullptr) {
    zmq_socket_monitor(socket.get(), nullptr, 0);
    return Error(Code::kResourceExhausted, "cannot create a ZeroMQ socket: " + LastError());
  }
  ZmqMonitor monitor(std::move(context), socket.get(), pair);
  const int zero = 0;
  zmq_setsockopt(pair, ZMQ_LINGER, &zero, sizeof(zero));
  zmq_setsockopt(pair, ZMQ_RCVHWM, &zero, sizeof(zero));  // no limit: an event must not be lost
  if (zmq_connect(pair, address.c_str()) != 0) {
    return Error(Code::kInternal, "cannot watch a ZeroMQ socket: " + LastError());
  }
  return monitor;
}

ZmqMonitor::ZmqMonitor(ZmqMonitor&& other) noexcept
    : context_(std::move(other.context_)),
      watched_(std::exchange(other.watched_, nullptr)),
      pair_(std::exchange(other.pair_, nullptr)) {}

ZmqMonitor& ZmqMonitor::operator=(ZmqMonitor&& other) noexcept {
  if (this != &other) {
    Close();
    context_ = std::move(other.context_);
    watched_ = std::exchange(other.watched_, nullptr);
    pair_ = std::exchange(other.pair_, nullptr);
  }
  return *this;
}

ZmqMonitor::~ZmqMonitor() { Close(); }

void ZmqMonitor::Close() {
  if (pair_ == nullptr) return;
  zmq_socket_monitor(std::exchange(watched_, nullptr), nullptr, 0);
  zmq_close(std::exchange(pair_, nullptr));
}

std::optional<ZmqMonitor::Event> ZmqMonitor::Receive() {
  // Two frames: event (2 bytes) and value (4 bytes), then the endpoint.
  ZmqFrame frame;
  if (!ReceiveFrom(pair_, frame)) return std::nullopt;
  Event event;
  int32_t value = -1;
  const std::string_view bytes = frame.view();
  if (bytes.size() >= sizeof(event.what) + sizeof(value)) {
    std::memcpy(&event.what, bytes.data(), sizeof(event.what));
    std::memcpy(&value, bytes.data() + sizeof(event.what), sizeof(value));
  }
  event.value = value;
  for (bool more = frame.more(); more;) {
    ZmqFrame rest;
    more = ReceiveFrom(pair_, rest) && rest.more();
  }
  return event;
}

int ZmqMonitor::fd() const { return FdOf(pair_); }

}  // namespace kvrelay::transport
