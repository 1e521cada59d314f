// One side of a transfer in a test: memory, lease records, a transport, and the control thread that
// it calls back on.
#pragma once

#include <cstdint>
#include <deque>
#include <functional>
#include <memory>
#include <mutex>
#include <optional>
#include <string>

#include "base/clock.h"
#include "kvcache/lease_record.h"
#include "kvcache/region.h"
#include "tests/common/temp_dir.h"
#include "transport/transport.h"

namespace kvrelay::transport {

// A control thread that the test's own thread plays: closures run inside RunUntil.
class Control {
 public:
  Executor executor();
  // Runs closures until `done` says so; false when it did not within the time.
  bool RunUntil(const std::function<bool()>& done, Duration timeout = std::chrono::seconds(20));
  void RunFor(Duration time) {
    RunUntil([] { return false; }, time);
  }

 private:
  struct Queue {
    std::mutex mutex;
    std::deque<std::function<void()>> closures;
  };
  std::shared_ptr<Queue> queue_ = std::make_shared<Queue>();
};

using tests::TempDir;

// Why this host does not have the transport; empty: it has it.
std::string WhyMissing(const std::string& transport);

inline constexpr RegionId kKv = 0;
inline constexpr RegionId kRecords = 1;

// What the lease of record `slot` is, for owner and reader alike.
GuardExpectation Lease(const PeerSpec& owner, uint32_t slot, uint32_t tokens = 100);

class Node {
 public:
  // `path`: the name of one of TransportKinds(), or "ucx-rail". Aborts the test when the transport
  // cannot be made.
  Node(const std::string& path, const std::string& run_dir, uint64_t kv_bytes,
       const std::function<void(Options&)>& change = {});
  ~Node();

  Transport& transport() { return *transport_; }
  Control& control() { return control_; }
  std::byte* kv() { return kv_->data(); }
  uint64_t kv_bytes() const { return kv_->bytes(); }
  LeaseRecord* record(uint32_t slot);
  static GuardRef guard(uint32_t slot) { return {kRecords, slot * sizeof(LeaseRecord)}; }
  // Begins the lease that Lease() expects, with `tokens` done.
  void StartLease(uint32_t slot, uint32_t tokens = 100);
  // How others reach us.
  PeerSpec Spec(const std::string& name) const;

  // Fills the KV with words that depend on seed and position.
  void Fill(uint64_t seed);
  // The first byte of [0, bytes) that Fill(seed) would not have left, or nullopt.
  std::optional<uint64_t> FirstWrong(uint64_t seed, uint64_t bytes) const;

  // Connects and waits.
  Result<PeerHandle> Connect(
      const PeerSpec& peer, std::function<void()> on_death = [] {},
      Duration timeout = std::chrono::seconds(20));
  // Runs the control thread until the operation that `start` starts has completed.
  Completion Await(const std::function<OpId(Done)>& start);
  void DestroyTransport() { transport_.reset(); }

 private:
  Control control_;
  std::optional<Region> kv_;
  std::optional<Region> records_;
  Incarnation incarnation_ = 0;
  std::unique_ptr<Transport> transport_;
};

// One contiguous copy, at the same offset on both sides.
CopyPlan Contiguous(uint64_t offset, uint64_t bytes);
// A stream of the first chunks * chunk_bytes of the KV; for sending and for receiving.
StreamPlan SendPlan(uint32_t chunks, uint64_t chunk_bytes);
StreamPlan ReceivePlan(uint32_t chunks, uint64_t chunk_bytes);

TimePoint In(Duration time);

// A spec as one word, for another process.
std::string ToText(const PeerSpec& spec);
PeerSpec FromText(const std::string& text);

}  // namespace kvrelay::transport
