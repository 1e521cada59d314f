// What a loop of UCX GETs reaches that knows nothing of leases, plans, deadlines or dead peers: as
// UCX configures itself, error mode NONE, all slices in flight at once.
#pragma once

#include <ucp/api/ucp.h>

#include <cstddef>
#include <memory>
#include <span>
#include <string>
#include <thread>

#include "base/status.h"
#include "tools/kvrelay/bench/pull_case.h"

namespace kvrelay::tools {

// A UCX context, worker and registered memory. One thread at a time.
class BareUcx {
 public:
  static Result<std::unique_ptr<BareUcx>> Create(std::span<std::byte> memory);
  ~BareUcx();
  BareUcx(const BareUcx&) = delete;
  BareUcx& operator=(const BareUcx&) = delete;

  // Where the memory is and how to reach it, for another process.
  Result<std::string> Invitation() const;
  Status Connect(const std::string& invitation);
  // After Connect.
  Status Get(const PullCase& pull);
  void Progress() { ucp_worker_progress(worker_); }

 private:
  explicit BareUcx(std::span<std::byte> memory) : memory_(memory) {}

  const std::span<std::byte> memory_;
  ucp_context_h context_ = nullptr;
  ucp_worker_h worker_ = nullptr;
  ucp_mem_h handle_ = nullptr;
  ucp_ep_h endpoint_ = nullptr;
  ucp_rkey_h remote_key_ = nullptr;
  uint64_t remote_ = 0;  // address of the peer's memory
};

// The owner's: progresses on a thread of its own, for UCX's wire-up and emulation.
class BareUcxOwner {
 public:
  static Result<std::unique_ptr<BareUcxOwner>> Start(std::span<std::byte> memory);
  const std::string& Invitation() const { return invitation_; }

 private:
  BareUcxOwner() = default;
  std::string invitation_;
  std::unique_ptr<BareUcx> ucx_;
  std::jthread thread_;
};

}  // namespace kvrelay::tools
