// One process of a pull benchmark: its memory, its transports, and a control thread that is whoever
// waits.
#pragma once

#include <condition_variable>
#include <functional>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "base/ids.h"
#include "base/status.h"
#include "kvcache/lease_record.h"
#include "kvcache/region.h"
#include "transport/transport.h"

namespace kvrelay::tools {

// Used by the thread that made it.
class Side {
 public:
  // `bytes` of KV in region 0, lease records in region 1, and every transport of this build that
  // can be had. kResourceExhausted when there is no memory.
  static Result<std::unique_ptr<Side>> Create(const std::string& run_dir, uint64_t bytes);

  struct Way {
    std::string name;
    std::unique_ptr<transport::Transport> transport;  // null: `why`
    std::string why;
  };

  Region& kv() { return kv_; }
  std::span<std::byte> memory() { return {kv_.data(), kv_.bytes()}; }
  const std::vector<Way>& ways() const { return ways_; }
  // The one lease of the benchmark, always live and complete on the owner's side.
  LeaseRecord* record() { return reinterpret_cast<LeaseRecord*>(records_.data()); }
  void StartLease();
  static transport::GuardRef guard() { return {1, 0}; }
  static GuardExpectation LeaseOf(Incarnation owner) { return {7, owner, 9, {1, 0}}; }

  // How others reach us by a transport; null: without an address.
  transport::PeerSpec Spec(const transport::Transport* transport) const;
  Incarnation incarnation() const { return incarnation_; }

  // Runs what the transports hand to the control thread until `done`. kDeadlineExceeded after a
  // minute.
  Status RunUntil(const std::function<bool()>& done);

 private:
  Side(Region kv, Region records);

  Region kv_;
  Region records_;
  const Incarnation incarnation_;
  std::mutex mutex_;
  std::vector<std::function<void()>> posted_;  // under mutex_
  std::condition_variable wake_;
  std::vector<Way> ways_;
};

}  // namespace kvrelay::tools
