// Built without ThreadSanitizer's instrumentation (base/CMakeLists.txt): the distributions' libtbb
// has none, so that TSan cannot see how TBB hands work from thread to thread and would report its
// every task. The two edges that callers rely on, start to range and range to return, are told to
// TSan by hand.
#include "base/parallel.h"

#include <oneapi/tbb/blocked_range.h>
#include <oneapi/tbb/global_control.h>
#include <oneapi/tbb/parallel_for.h>
#include <oneapi/tbb/task_arena.h>

#include <algorithm>
#include <memory>
#include <mutex>

#include "base/cpu.h"

#ifdef KVRELAY_TSAN
#include <sanitizer/tsan_interface.h>
#endif

namespace kvrelay {
namespace {

#ifdef KVRELAY_TSAN
void TsanAcquire(char& edge) { __tsan_acquire(&edge); }
void TsanRelease(char& edge) { __tsan_release(&edge); }
#else
void TsanAcquire(char&) {}
void TsanRelease(char&) {}
#endif

struct Pool {
  explicit Pool(int threads)
      : threads(threads),
        allowed(tbb::global_control::max_allowed_parallelism, static_cast<size_t>(threads)),
        arena(threads) {}

  const int threads;
  // TBB counts processors, not the cgroup's quota. The smallest number alive wins.
  tbb::global_control allowed;
  tbb::task_arena arena;
};

// Not a function's static object: TSan would not see this file's check that it is constructed.
constinit std::mutex slot_mutex;

// The caller holds slot_mutex. Leaked on purpose: worker threads and other static objects may
// outlive this file's.
std::shared_ptr<Pool>& Slot() {
  static constinit std::shared_ptr<Pool>* slot = nullptr;
  if (slot == nullptr) slot = new auto(std::make_shared<Pool>(AvailableThreads()));
  return *slot;
}

std::shared_ptr<Pool> CurrentPool() {
  const std::lock_guard lock(slot_mutex);
  return Slot();
}

}  // namespace

void SetParallelism(int threads) {
  auto pool = std::make_shared<Pool>(std::max(1, threads));
  const std::lock_guard lock(slot_mutex);
  Slot().swap(pool);
}

int Parallelism() { return CurrentPool()->threads; }

namespace internal {

void ParallelForRange(size_t count, size_t grain, void* context, RangeFn fn) {
  grain = std::max<size_t>(1, grain);
  if (count == 0) return;
  if (count <= grain) return fn(context, 0, count);
  const std::shared_ptr<Pool> pool = CurrentPool();
  if (pool->threads == 1) {
    for (size_t begin = 0; begin < count; begin += grain) {
      fn(context, begin, std::min(count, begin + grain));
    }
    return;
  }
  char started = 0;
  char finished = 0;
  TsanRelease(started);
  pool->arena.execute([&] {
    // Isolated: while it waits for its last ranges, this thread must not pick up another caller's.
    tbb::this_task_arena::isolate([&] {
      tbb::parallel_for(
          tbb::blocked_range<size_t>(0, count, grain),
          [&](const tbb::blocked_range<size_t>& range) {
            TsanAcquire(started);
            fn(context, range.begin(), range.end());
            TsanRelease(finished);
          },
          tbb::simple_partitioner());
    });
  });
  TsanAcquire(finished);
}

}  // namespace internal
}  // namespace kvrelay
