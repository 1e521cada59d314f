#include "tools/kvrelay/bench/side.h"

#include <chrono>
#include <utility>

#include "base/random.h"

namespace kvrelay::tools {

Side::Side(Region kv, Region records)
    : kv_(std::move(kv)), records_(std::move(records)), incarnation_(RandomIncarnation()) {}

Result<std::unique_ptr<Side>> Side::Create(const std::string& run_dir, uint64_t bytes) {
  KVRELAY_ASSIGN_OR_RETURN(Region kv, Region::AllocateHost(bytes, "kvrelay-bench"));
  KVRELAY_ASSIGN_OR_RETURN(Region records, Region::AllocateHost(4096, "kvrelay-bench-records"));
  std::unique_ptr<Side> side(new Side(std::move(kv), std::move(records)));
  transport::Options options;
  for (const Region* region : {&side->kv_, &side->records_}) {
    options.regions.push_back(transport::LocalRegion::Of(*region));
  }
  options.executor = [self = side.get()](std::function<void()> fn) {
    {
      const std::lock_guard lock(self->mutex_);
      self->posted_.push_back(std::move(fn));
    }
    self->wake_.notify_one();
  };
  options.run_dir = run_dir;
  options.incarnation = side->incarnation_;
  for (const transport::TransportKind& kind : transport::TransportKinds()) {
    Way way{std::string(kind.name), nullptr, ""};
    auto made = kind.create(options);
    if (made.has_value()) {
      way.transport = std::move(*made);
    } else {
      way.why = made.error().message();
    }
    side->ways_.push_back(std::move(way));
  }
  return side;
}

void Side::StartLease() {
  const GuardExpectation lease = LeaseOf(incarnation_);
  record()->Start(lease.epoch, lease.incarnation, lease.table_hash);
  record()->Publish({.tokens = 1, .chunk_end = 1, .layers = 0});
}

transport::PeerSpec Side::Spec(const transport::Transport* transport) const {
  return {"the owner",
          transport == nullptr ? "" : transport->LocalAddress(),
          {kv_.bytes(), records_.bytes()},
          incarnation_};
}

Status Side::RunUntil(const std::function<bool()>& done) {
  const auto until = std::chrono::steady_clock::now() + std::chrono::minutes(1);
  std::vector<std::function<void()>> batch;
  while (!done()) {
    {
      std::unique_lock lock(mutex_);
      if (!wake_.wait_until(lock, until, [this] { return !posted_.empty(); })) {
        return {Code::kDeadlineExceeded, "a transport did not answer within a minute"};
      }
      batch.swap(posted_);
    }
    for (auto& fn : batch) fn();
    batch.clear();
  }
  return {};
}

}  // namespace kvrelay::tools
