// UCX's context and worker as owning types, set up for processes that may die at any moment.
#pragma once

#include <ucp/api/ucp.h>

#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <span>
#include <string>

#include "base/status.h"
#include "transport/packed_carrier.h"
#include "transport/ucx_one_sided.h"

namespace kvrelay::transport {

struct UcxSettings {
  std::string interface;       // the only one that data crosses, for example "lo" or "eth1"
  uint64_t message_bytes = 0;  // of the largest message; it fits into one segment

  // Of one segment with UCX's header and ours. A connection holds at most two: one that is being
  // sent, one that is being received.
  uint64_t segment_bytes() const { return message_bytes + 4096; }
};

// Why UCX cannot use the interface, or ok.
Status CheckInterface(const std::string& interface);

// Two kinds, two rooms. Each sets every option that matters to it itself: UCX_* variables of the
// user's environment change nothing that we rely on.
class UcxContext {
 public:
  // Active messages over TCP, with the features AM and WAKEUP, never RMA: a process that serves no
  // raw memory cannot be asked for it.
  static Result<std::shared_ptr<UcxContext>> CreatePacked(const UcxSettings& settings);
  // One-sided reads over `lanes`, with the features RMA and WAKEUP, and no active messages: what a
  // lane cannot do without the peer's help is an error instead of an emulation.
  static Result<std::shared_ptr<UcxContext>> CreateOneSided(const OneSidedLanes& lanes);
  ~UcxContext() { ucp_cleanup(context_); }
  UcxContext(const UcxContext&) = delete;
  UcxContext& operator=(const UcxContext&) = delete;

  ucp_context_h get() const { return context_; }

 private:
  explicit UcxContext(ucp_context_h context) : context_(context) {}
  ucp_context_h context_;
};

// Progresses what its context receives, sends and reads. One thread at a time.
class UcxWorker {
 public:
  using OnMessage = PackedCarrier::OnMessage;
  // For a message that asks for a rendezvous.
  using OnForeign = PackedCarrier::OnForeign;

  static Result<std::shared_ptr<UcxWorker>> Create(std::shared_ptr<UcxContext> context);
  // Before anybody knows the address.
  Status Receive(OnMessage on_message, OnForeign on_foreign);
  ~UcxWorker() { ucp_worker_destroy(worker_); }
  UcxWorker(const UcxWorker&) = delete;
  UcxWorker& operator=(const UcxWorker&) = delete;

  ucp_worker_h get() const { return worker_; }
  const UcxContext& context() const { return *context_; }
  // Where messages for this worker go, as UCX writes it.
  Result<std::string> Address() const;
  // `flushed` is called once, perhaps inside: whatever was posted before has ended, and endpoints
  // that were closed before are gone. (UCX reports a forced close as done while it still takes the
  // connection down.)
  void Flush(std::function<void()> flushed);
  // True when something happened.
  bool Progress() { return ucp_worker_progress(worker_) != 0; }
  // Readable when there is something to progress after a successful Arm. Owned by the worker.
  Result<int> EventFd() const;
  // Before sleeping on EventFd(). False: there is something to progress now.
  bool Arm() { return ucp_worker_arm(worker_) == UCS_OK; }

 private:
  UcxWorker(std::shared_ptr<UcxContext> context, ucp_worker_h worker)
      : context_(std::move(context)), worker_(worker) {}
  static ucs_status_t OnActiveMessage(void* self, const void* header, size_t header_bytes,
                                      void* data, size_t bytes, const ucp_am_recv_param_t* param);

  const std::shared_ptr<UcxContext> context_;
  const ucp_worker_h worker_;
  OnMessage on_message_;
  OnForeign on_foreign_;
};

// The active message that all ours are.
inline constexpr unsigned kUcxMessageId = 1;

}  // namespace kvrelay::transport
