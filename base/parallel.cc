// Built without ThreadSanitizer's instrumentation (base/CMakeLists.txt): the distributions' libtbb
// has none, so that TSan cannot see how TBB hands work from thread to thread and would report its
// every task. The two edges that callers rely on, start to range and range to return, are told to
// TSan by hand.
#include "base/parallel.h"

#include <oneapi/tbb/blocked_range.h>
#include <oneapi/tbb/global_control.h>
#include <oneapi/tbb/info.h>
#include <oneapi/tbb/parallel_for.h>
#include <oneapi/tbb/task_arena.h>
#include <sched.h>

#include <algorithm>
#include <deque>
#include <memory>
#include <mutex>
#include <vector>

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

// oneTBB asks hwloc, which takes its time: only machines with several nodes are asked. Both keep to
// the process's affinity mask.
NumaTopology ReadTopology() {
  NumaTopology topology{.nodes = {}, .locate = LocatePages};
  if (!NamesSeveralNodes("/sys/devices/system/node/online")) return topology;
  for (const tbb::numa_node_id binding : tbb::info::numa_nodes()) {
    if (binding < 0) continue;  // it does not know, for want of libtbbbind
    unsigned cpu = 0;
    unsigned node = 0;
    // Its numbers are not the kernel's: those tells a thread that is bound there.
    tbb::task_arena arena{tbb::task_arena::constraints{}.set_numa_id(binding)};
    if (arena.execute([&] { return ::getcpu(&cpu, &node); }) != 0) continue;
    // A node of memory alone is shown with the processors of another.
    const auto id = static_cast<int>(node);
    if (std::ranges::count(topology.nodes, id, &NumaTopology::Node::id) > 0) continue;
    topology.nodes.push_back({id, binding, tbb::info::default_concurrency(binding)});
  }
  if (topology.nodes.size() < 2) topology.nodes.clear();
  return topology;
}

struct Pool {
  Pool(int threads, NumaTopology of_machine)
      : threads(threads),
        topology(std::move(of_machine)),
        allowed(tbb::global_control::max_allowed_parallelism, static_cast<size_t>(threads)),
        arena(threads) {
    for (const NumaTopology::Node& node : topology.nodes) {
      near.emplace_back(tbb::task_arena::constraints{}
                            .set_numa_id(node.binding)
                            .set_max_concurrency(std::min(node.threads, threads)));
    }
  }

  const int threads;
  const NumaTopology topology;
  // TBB counts processors, not the cgroup's quota. The smallest number alive wins.
  tbb::global_control allowed;
  tbb::task_arena arena;
  std::deque<tbb::task_arena> near;  // by node; an arena cannot be moved
};

// Not a function's static object: TSan would not see this file's check that it is constructed.
constinit std::mutex slot_mutex;

// The caller holds slot_mutex. Leaked on purpose: worker threads and other static objects may
// outlive this file's.
std::shared_ptr<Pool>& Slot() {
  static constinit std::shared_ptr<Pool>* slot = nullptr;
  if (slot == nullptr) slot = new auto(std::make_shared<Pool>(AvailableThreads(), ReadTopology()));
  return *slot;
}

std::shared_ptr<Pool> CurrentPool() {
  const std::lock_guard lock(slot_mutex);
  return Slot();
}

// fn(begin, end) for ranges of at most `grain` that cover [0, count), on the arena's threads.
template <typename Fn>
void RunIn(tbb::task_arena& arena, size_t count, size_t grain, const Fn& fn) {
  char started = 0;
  char finished = 0;
  TsanRelease(started);
  arena.execute([&] {
    // Isolated: while it waits for its last ranges, this thread must not pick up another caller's.
    tbb::this_task_arena::isolate([&] {
      tbb::parallel_for(
          tbb::blocked_range<size_t>(0, count, grain),
          [&](const tbb::blocked_range<size_t>& range) {
            TsanAcquire(started);
            fn(range.begin(), range.end());
            TsanRelease(finished);
          },
          tbb::simple_partitioner());
    });
  });
  TsanAcquire(finished);
}

}  // namespace

void SetParallelism(int threads) {
  std::shared_ptr<Pool> pool;  // the former one ends outside the lock
  const std::lock_guard lock(slot_mutex);
  pool = std::make_shared<Pool>(std::max(1, threads), Slot()->topology);
  Slot().swap(pool);
}

int Parallelism() { return CurrentPool()->threads; }

void SetNumaTopology(NumaTopology topology) {
  std::shared_ptr<Pool> pool;
  const std::lock_guard lock(slot_mutex);
  pool = std::make_shared<Pool>(Slot()->threads, std::move(topology));
  Slot().swap(pool);
}

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
  RunIn(pool->arena, count, grain, [&](size_t begin, size_t end) { fn(context, begin, end); });
}

void ParallelForNearRange(size_t count, size_t grain, void* context, NearFn near, RangeFn fn) {
  grain = std::max<size_t>(1, grain);
  const std::shared_ptr<Pool> pool = CurrentPool();
  const NumaTopology& topology = pool->topology;
  if (topology.nodes.empty() || pool->threads == 1 || count <= grain) {
    return ParallelForRange(count, grain, context, fn);
  }
  const size_t parts = (count + grain - 1) / grain;
  std::vector<const void*> pages(parts);
  for (size_t part = 0; part < parts; ++part) pages[part] = near(context, part * grain);
  std::vector<int> located(parts);
  topology.locate(pages, located);
  const std::vector<NodeShare> shares = ShareByNode(topology, located);
  // Each share is begun by a thread of its own, or by the caller after another.
  RunIn(pool->arena, shares.size(), 1, [&](size_t first, size_t last) {
    for (size_t i = first; i < last; ++i) {
      const NodeShare& share = shares[i];
      tbb::task_arena& arena =
          share.node < 0 ? pool->arena : pool->near[static_cast<size_t>(share.node)];
      RunIn(arena, share.parts.size(), 1, [&](size_t begin, size_t end) {
        for (size_t k = begin; k < end; ++k) {
          const size_t at = share.parts[k] * grain;
          fn(context, at, std::min(count, at + grain));
        }
      });
    }
  });
}

}  // namespace internal
}  // namespace kvrelay
