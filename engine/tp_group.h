// Tensor-parallel ranks as threads of one process: they run a step together and add up their
// partial results.
#pragma once

#include <array>
#include <atomic>
#include <cstdint>
#include <functional>
#include <mutex>
#include <span>
#include <thread>
#include <vector>

#include "base/status.h"

namespace kvrelay::engine {

// Rank 0 is the thread that calls Run; the others have a thread each, which spins a short while
// after a step and then sleeps. The destructor joins them; no Run may be under way.
class TpGroup {
 public:
  using StepFn = std::function<Status(uint32_t rank)>;

  explicit TpGroup(uint32_t size);
  ~TpGroup();
  TpGroup(const TpGroup&) = delete;
  TpGroup& operator=(const TpGroup&) = delete;

  uint32_t size() const { return size_; }

  // Calls step(rank) once for every rank, at the same time, and returns when all have returned. The
  // error that came first in time wins; after it, ranks that wait in AllReduce get kCancelled. One
  // caller at a time.
  Status Run(const StepFn& step);

  // Inside Run, by every rank: returns when all have called it. kCancelled when a rank has failed.
  Status Meet();
  // Inside Run, by every rank with spans of equal length: each element becomes the sum over all
  // ranks, added in the order of the ranks, so that the result does not depend on timing and is the
  // same bits on all ranks.
  Status AllReduce(uint32_t rank, std::span<float> data);

 private:
  void Loop(uint32_t rank);
  void RunRank(uint32_t rank);
  // False when a rank has failed: the step is lost.
  bool Barrier();
  // Waits until `word` is no longer `old`.
  void WaitWhile(const std::atomic<uint32_t>& word, uint32_t old) const;

  const uint32_t size_;
  const int spins_;               // before sleeping; none where ranks outnumber processors
  const StepFn* step_ = nullptr;  // written before generation_ moves on
  // What the ranks add, by rank, in turns: a rank fills one set while slower ones still read the
  // other, and needs no second barrier.
  std::array<std::vector<std::vector<float>>, 2> parts_;
  std::vector<uint32_t> reductions_;  // AllReduce calls since the step began, by rank

  std::atomic<uint32_t> generation_{0};  // one more: a new step, or the end
  std::atomic<bool> stop_{false};
  std::atomic<uint32_t> running_{0};  // ranks with a thread that have not finished the step
  std::atomic<uint32_t> arrived_{0};  // ranks in the barrier
  std::atomic<uint32_t> phase_{0};    // one more: the barrier opened, or a rank failed
  std::atomic<bool> failed_{false};   // set before phase_ moves on

  std::mutex mutex_;
  Status first_error_;  // under mutex_
  std::vector<std::thread> threads_;
};

}  // namespace kvrelay::engine
