// One connection to another process's worker, as an owning type.
#pragma once

#include <ucp/api/ucp.h>

#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <span>
#include <string_view>

#include "base/status.h"
#include "transport/packed_carrier.h"
#include "transport/ucx_memory.h"
#include "transport/ucx_worker.h"

namespace kvrelay::transport {

// Some one-sided reads, taken together.
struct UcxGets {
  uint32_t in_flight = 0;
  ucs_status_t failure = UCS_OK;  // of the first that failed
};

// The thread that progresses the worker. UCX calls back into the endpoint until it is closed and
// idle: destroy it only then, or after its worker.
class UcxEndpoint final : public PackedEndpoint {
 public:
  static Result<std::unique_ptr<UcxEndpoint>> Create(UcxWorker& worker, std::string_view address);

  UcxEndpoint(const UcxEndpoint&) = delete;
  UcxEndpoint& operator=(const UcxEndpoint&) = delete;

  // After a forced close UCX reports success too.
  void Send(std::span<const std::byte> header, std::span<const std::byte> data, Sent sent) override;
  // Reads the peer's memory from `remote` on into `into`, which lies in `memory`. `gets` counts it,
  // and stays where it is until it counts nothing any more. Not after Close.
  void Get(std::span<std::byte> into, const UcxMemory& memory, uint64_t remote,
           const UcxRemoteKey& key, UcxGets* gets);
  const Status& failure() const override { return failure_; }

  void Close() override;
  bool closing() const override { return closing_; }
  // The close has completed: UCX touches no memory of ours any more.
  bool closed() const { return closed_; }
  bool finished() const override { return closed_ && in_flight_ == 0; }

  ucp_ep_h get() const { return endpoint_; }

 private:
  UcxEndpoint() = default;
  static void OnError(void* self, ucp_ep_h endpoint, ucs_status_t status);
  static void OnSent(void* request, ucs_status_t status, void* context);
  static void OnGot(void* request, ucs_status_t status, void* context);
  static void OnClosed(void* request, ucs_status_t status, void* self);

  ucp_ep_h endpoint_ = nullptr;
  Status failure_;
  bool closing_ = false;
  bool closed_ = false;
  uint32_t in_flight_ = 0;
};

}  // namespace kvrelay::transport
