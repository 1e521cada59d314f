// One pool of worker threads for everything that computes or copies: attention, large host copies,
// samplers. BLAS has its own threads and is told the same number by the engine.
#pragma once

#include <cstddef>
#include <memory>
#include <type_traits>
#include <utility>

#include "base/numa.h"

namespace kvrelay {

// How many threads one ParallelFor may use, its caller included: at least 1; at first
// AvailableThreads() (base/cpu.h). Any thread; calls that are running keep the number that they
// started with.
void SetParallelism(int threads);
int Parallelism();

// For tests: the machine as ParallelForNear sees it from now on, instead of what it is.
void SetNumaTopology(NumaTopology topology);

namespace internal {
using RangeFn = void (*)(void* context, size_t begin, size_t end);
using NearFn = const void* (*)(void* context, size_t begin);
void ParallelForRange(size_t count, size_t grain, void* context, RangeFn fn);
void ParallelForNearRange(size_t count, size_t grain, void* context, NearFn near, RangeFn fn);
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

// The same of work on memory that may lie on several nodes (NUMA): ranges begin at multiples of
// `grain`, and each runs on processors of the node where the page at near(begin) lies, as
// ShareByNode (base/numa.h) decides. Where the process runs on one node, or oneTBB's libtbbbind is
// not installed, it is ParallelFor and `near` is not called.
template <typename Near, typename Fn>
void ParallelForNear(size_t count, size_t grain, Near&& near, Fn&& fn) {
  struct Target {
    std::remove_reference_t<Near>* near;
    std::remove_reference_t<Fn>* fn;
  } target{std::addressof(near), std::addressof(fn)};
  internal::ParallelForNearRange(
      count, grain, &target,
      [](void* context, size_t begin) -> const void* {
        return (*static_cast<Target*>(context)->near)(begin);
      },
      [](void* context, size_t begin, size_t end) {
        (*static_cast<Target*>(context)->fn)(begin, end);
      });
}

}  // namespace kvrelay
