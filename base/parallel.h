// One pool of worker threads for everything that computes or copies: attention, large host copies,
// samplers. BLAS has its own threads and is told the same number by the engine.
#pragma once

#include <cstddef>
#include <memory>
#include <type_traits>
#include <utility>

namespace kvrelay {

// How many threads one ParallelFor may use, its caller included: at least 1; at first
// AvailableThreads() (base/cpu.h). Any thread; calls that are running keep the number that they
// started with.
void SetParallelism(int threads);
int Parallelism();

namespace internal {
using RangeFn = void (*)(void* context, size_t begin, size_t end);
void ParallelForRange(size_t count, size_t grain, void* context, RangeFn fn);
}  // namespace internal

// Calls fn(begin, end) for ranges of at most `grain` (at least 1) that together cover [0, count)
// once each, in any order, on several threads and on the caller's, and returns when all calls have
// returned: what they wrote is visible to the caller. Choose a grain of tens of microseconds of
// work: a call costs about 1 us while the workers are awake and 50 us when they have gone to sleep
// (after some ms). Work of one range only runs on the caller and costs nothing.
//
// Any thread, several at once (they share the pool), also from within fn. fn must not throw, and
// must not wait for another range of the same call.
template <typename Fn>
void ParallelFor(size_t count, size_t grain, Fn&& fn) {
  using Target = std::remove_reference_t<Fn>;
  const internal::RangeFn call = [](void* context, size_t begin, size_t end) {
    (*static_cast<Target*>(context))(begin, end);
  };
  void* context = const_cast<void*>(static_cast<const void*>(std::addressof(fn)));
  internal::ParallelForRange(count, grain, context, call);
}

}  // namespace kvrelay
