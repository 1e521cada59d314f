// What a loop of UCX GETs reaches that knows nothing of leases, plans, deadlines or dead peers: as
// UCX configures itself, error mode NONE, all slices in flight at once.
#pragma once

#include <cstddef>
#include <memory>
#include <span>
#include <string>
#include <thread>

#include "base/status.h"
#include "tools/kvrelay/bench/bare_worker.h"
#include "tools/kvrelay/bench/pull_case.h"

namespace kvrelay::tools {

// A worker and registered memory. One thread at a time.
class BareGet {
 public:
  static Result<std::unique_ptr<BareGet>> Create(std::span<std::byte> memory);
  ~BareGet();
  BareGet(const BareGet&) = delete;
  BareGet& operator=(const BareGet&) = delete;

  // Where the memory is and how to reach it, for another process.
  Result<std::string> Invitation() const;
  Status Connect(const std::string& invitation);
  // After Connect.
  Status Get(const PullCase& pull);
  void Progress() { worker_->Progress(); }

 private:
  BareGet(std::span<std::byte> memory, std::unique_ptr<BareWorker> worker)
      : memory_(memory), worker_(std::move(worker)) {}

  const std::span<std::byte> memory_;
  const std::unique_ptr<BareWorker> worker_;
  ucp_mem_h handle_ = nullptr;
  ucp_rkey_h remote_key_ = nullptr;
  uint64_t remote_ = 0;  // address of the peer's memory
};

// The owner's: progresses on a thread of its own, for UCX's wire-up and emulation.
class BareGetOwner {
 public:
  static Result<std::unique_ptr<BareGetOwner>> Start(std::span<std::byte> memory);
  const std::string& Invitation() const { return invitation_; }

 private:
  BareGetOwner() = default;
  std::string invitation_;
  std::unique_ptr<BareGet> get_;
  std::jthread thread_;
};

}  // namespace kvrelay::tools
