// Memory that UCX has registered, and the key by which a peer's can be read, as owning types.
#pragma once

#include <ucp/api/ucp.h>

#include <cstddef>
#include <memory>
#include <span>
#include <string>
#include <string_view>
#include <utility>

#include "base/status.h"
#include "transport/ucx_worker.h"

namespace kvrelay::transport {

// Any thread.
class UcxMemory {
 public:
  // `memory` outlives it. Registered once: reads into it look nothing up.
  static Result<std::unique_ptr<UcxMemory>> Register(std::shared_ptr<UcxContext> context,
                                                     std::span<std::byte> memory);
  ~UcxMemory() { (void)ucp_mem_unmap(context_->get(), handle_); }
  UcxMemory(const UcxMemory&) = delete;
  UcxMemory& operator=(const UcxMemory&) = delete;

  ucp_mem_h get() const { return handle_; }
  // What a peer needs beside the address to read it.
  Result<std::string> Key() const;

 private:
  UcxMemory(std::shared_ptr<UcxContext> context, ucp_mem_h handle)
      : context_(std::move(context)), handle_(handle) {}
  const std::shared_ptr<UcxContext> context_;
  const ucp_mem_h handle_;
};

// The thread that progresses the worker. Destroy it when nothing reads with it any more, before the
// worker.
class UcxRemoteKey {
 public:
  static Result<UcxRemoteKey> Unpack(ucp_ep_h endpoint, std::string_view key);
  ~UcxRemoteKey() {
    if (key_ != nullptr) ucp_rkey_destroy(key_);
  }
  UcxRemoteKey(UcxRemoteKey&& other) noexcept : key_(std::exchange(other.key_, nullptr)) {}
  UcxRemoteKey& operator=(UcxRemoteKey&&) = delete;

  ucp_rkey_h get() const { return key_; }

 private:
  explicit UcxRemoteKey(ucp_rkey_h key) : key_(key) {}
  ucp_rkey_h key_;
};

}  // namespace kvrelay::transport
