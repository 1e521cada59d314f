// What a stream of UCX active messages reaches that nobody packs or unpacks, at the settings of
// ucx-packed: TCP over loopback, segments as large as a message, error mode PEER.
#pragma once

#include <cstdint>
#include <memory>
#include <string>

#include "base/status.h"
#include "tools/kvrelay/bench/bare_worker.h"

namespace kvrelay::tools {

// One thread at a time.
class BareSender {
 public:
  static Result<std::unique_ptr<BareSender>> Connect(const std::string& receiver,
                                                     uint64_t message_bytes);
  // Returns when UCX has copied all; what the socket does not take at once needs Progress.
  Status Send(uint64_t bytes);
  void Progress() { worker_->Progress(); }

 private:
  BareSender(std::unique_ptr<BareWorker> worker, uint64_t message_bytes)
      : worker_(std::move(worker)), message_(message_bytes, 's') {}
  Status Wait(uint32_t in_flight);

  const std::unique_ptr<BareWorker> worker_;
  const std::string message_;
  uint32_t in_flight_ = 0;
  Status failure_;
};

// One thread at a time.
class BareReceiver {
 public:
  static Result<std::unique_ptr<BareReceiver>> Create(uint64_t message_bytes);
  Result<std::string> Address() const { return worker_->Address(); }
  // Until so many bytes more have come; kDeadlineExceeded after a minute.
  Status Receive(uint64_t bytes);

 private:
  explicit BareReceiver(std::unique_ptr<BareWorker> worker) : worker_(std::move(worker)) {}

  const std::unique_ptr<BareWorker> worker_;
  uint64_t received_ = 0;
  uint64_t asked_ = 0;
};

}  // namespace kvrelay::tools
