#include "engine/tp_group.h"

#include <pthread.h>

#include <algorithm>
#include <string>

#include "base/cpu.h"

namespace kvrelay::engine {
namespace {

// About 20 us: longer than the ranks' skew within a layer, shorter than a scheduler's time slice.
constexpr int kSpins = 500;

void Pause() { __builtin_ia32_pause(); }

}  // namespace

TpGroup::TpGroup(uint32_t size)
    : size_(size),
      spins_(static_cast<int>(size) <= AvailableThreads() ? kSpins : 0),
      reductions_(size) {
  for (auto& parts : parts_) parts.resize(size);
  for (uint32_t rank = 1; rank < size_; ++rank) {
    threads_.emplace_back([this, rank] { Loop(rank); });
  }
}

TpGroup::~TpGroup() {
  stop_.store(true, std::memory_order_relaxed);
  generation_.fetch_add(1, std::memory_order_release);
  generation_.notify_all();
  for (std::thread& thread : threads_) thread.join();
}

void TpGroup::WaitWhile(const std::atomic<uint32_t>& word, uint32_t old) const {
  for (int i = 0; i < spins_; ++i) {
    if (word.load(std::memory_order_acquire) != old) return;
    Pause();
  }
  while (word.load(std::memory_order_acquire) == old) word.wait(old, std::memory_order_acquire);
}

void TpGroup::Loop(uint32_t rank) {
  ::pthread_setname_np(::pthread_self(), ("kvr-rank-" + std::to_string(rank)).c_str());
  uint32_t seen = 0;
  while (true) {
    WaitWhile(generation_, seen);
    ++seen;
    if (stop_.load(std::memory_order_relaxed)) return;
    RunRank(rank);
    if (running_.fetch_sub(1, std::memory_order_acq_rel) == 1) running_.notify_all();
  }
}

void TpGroup::RunRank(uint32_t rank) {
  Status status = (*step_)(rank);
  if (status.ok()) return;
  {
    const std::lock_guard lock(mutex_);
    if (first_error_.ok()) first_error_ = std::move(status);
  }
  failed_.store(true, std::memory_order_relaxed);
  phase_.fetch_add(1, std::memory_order_release);
  phase_.notify_all();
}

Status TpGroup::Run(const StepFn& step) {
  step_ = &step;
  first_error_ = Status::Ok();
  failed_.store(false, std::memory_order_relaxed);
  arrived_.store(0, std::memory_order_relaxed);
  std::fill(reductions_.begin(), reductions_.end(), 0);
  running_.store(size_ - 1, std::memory_order_relaxed);
  generation_.fetch_add(1, std::memory_order_release);
  generation_.notify_all();
  RunRank(0);
  for (uint32_t left = running_.load(std::memory_order_acquire); left != 0;
       left = running_.load(std::memory_order_acquire)) {
    WaitWhile(running_, left);
  }
  return std::move(first_error_);
}

bool TpGroup::Barrier() {
  const uint32_t phase = phase_.load(std::memory_order_acquire);
  if (failed_.load(std::memory_order_relaxed)) return false;
  if (arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 == size_) {
    arrived_.store(0, std::memory_order_relaxed);
    phase_.fetch_add(1, std::memory_order_release);
    phase_.notify_all();
  } else {
    WaitWhile(phase_, phase);
  }
  return !failed_.load(std::memory_order_relaxed);
}

Status TpGroup::Meet() {
  if (size_ == 1 || Barrier()) return Status::Ok();
  return {Code::kCancelled, "another rank failed"};
}

Status TpGroup::AllReduce(uint32_t rank, std::span<float> data) {
  if (size_ == 1) return Status::Ok();
  std::vector<std::vector<float>>& parts = parts_[reductions_[rank]++ % 2];
  parts[rank].assign(data.begin(), data.end());
  KVRELAY_RETURN_IF_ERROR(Meet());
  // Everybody adds up everything: waiting for others to do a part of it costs more than the
  // additions.
  std::copy(parts[0].begin(), parts[0].end(), data.begin());
  for (uint32_t other = 1; other < size_; ++other) {
    const float* add = parts[other].data();
    for (size_t i = 0; i < data.size(); ++i) data[i] += add[i];
  }
  return Status::Ok();
}

}  // namespace kvrelay::engine
