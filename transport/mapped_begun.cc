#include "transport/mapped_begun.h"

namespace kvrelay::transport {

std::unique_ptr<BegunRead> MappedBegun::Begin(std::shared_ptr<Device> device,
                                              std::shared_ptr<const MappedMemory> peer,
                                              const CopyPlan& plan,
                                              std::span<std::byte* const> local,
                                              const GuardRef& guard, const GuardExpectation& want) {
  const LeaseRecord& record = peer->record(guard);
  std::unique_ptr<MappedBegun> read(new MappedBegun(std::move(device), std::move(peer), record));
  Completion& completion = read->completion_;
  completion.before = record.ReadBefore();
  // What would be thrown away is not moved.
  if (!GuardHolds(want, completion.before, completion.before)) return nullptr;
  auto copy = read->device_->Copy(plan, read->peer_->bases, local);
  if (!copy.has_value()) return nullptr;
  read->copy_ = *std::move(copy);
  completion.bytes = plan.bytes();
  return read;
}

std::optional<Completion> MappedBegun::Look() {
  std::optional<Status> ended = copy_->Ended();
  if (!ended) return std::nullopt;
  completion_.after = record_.ReadAfter();
  completion_.status = *std::move(ended);
  return std::move(completion_);
}

}  // namespace kvrelay::transport
