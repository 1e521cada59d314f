// Calls between agents, as protocol logic sees them: no socket, no thread. The real one is
// ROUTER/DEALER on the control thread (zmq_rpc.h); tests/sim has one that loses, repeats and
// reorders.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <string_view>

#include "base/clock.h"
#include "base/status.h"
#include "proto/messages.h"

namespace kvrelay::agent {

// Answers one request. May be kept and used later, on the control thread; dropping the last copy
// without a final answer sends kInternal, so that no caller waits for ever. Answers after the final
// one, or after the caller went away, are dropped.
class Responder {
 public:
  virtual ~Responder() = default;
  virtual void Reply(std::string body, bool more) = 0;  // body: proto::Encode of the reply struct
  virtual void Fail(const Status& status) = 0;
  // True once the caller is known to be gone (disconnected, or cancelled by its own deadline).
  virtual bool cancelled() const = 0;
  // `fn` runs once on the control thread when cancelled() becomes true, never after the final
  // answer and never inside a call of this object. Replaces the function set before. What `fn`
  // holds is let go with it: it may hold this responder.
  virtual void OnCancel(std::function<void()> fn) = 0;
};
using ResponderPtr = std::shared_ptr<Responder>;

class Rpc {
 public:
  using CallId = uint64_t;  // 0 is never a call
  // Bodies are encoded proto structs. The request's body is valid during the call only.
  using Handler = std::function<void(std::string_view body, ResponderPtr responder)>;
  // `more`: further replies follow. Exactly one call with more == false or an error.
  using OnReply = std::function<void(Result<std::string> body, bool more)>;

  virtual ~Rpc() = default;
  // All on the control thread. One handler per type; a request without one is answered
  // kInvalidArgument.
  virtual void Handle(proto::Type type, Handler handler) = 0;
  // Sends now; the callback never runs inside Call. kDeadlineExceeded at the deadline,
  // kPeerUnreachable when the connection is refused or broken. The message is not repeated: callers
  // repeat idempotent ones (see call.h).
  virtual CallId Call(const std::string& endpoint, proto::Type type, std::string body,
                      TimePoint deadline, OnReply on_reply) = 0;
  // The callback does not run any more. Unknown ids are ignored.
  virtual void Abandon(CallId id) = 0;
};

}  // namespace kvrelay::agent
