#include "kvcache/copy_host.h"

#include <algorithm>
#include <vector>

#include "base/cpu.h"
#include "base/parallel.h"
#include "kvcache/copy_host_run.h"

namespace kvrelay {
namespace {

using internal::CopyRun;
using internal::kLine;

// A run longer than this is copied in pieces, so that threads can share it.
constexpr uint64_t kPiece = 256 << 10;
// Plans over this are shared among threads (a start costs about 5 us, a MiB 60 to 250), in parts of
// about kPart at least.
constexpr uint64_t kSerial = 1 << 20;
constexpr uint64_t kPart = 256 << 10;
// Copies over this go around the caches: the destination would push out of them what others still
// need, and a line need not be read before it is overwritten. Smaller ones are read again soon, out
// of the cache.
constexpr uint64_t kStreamFrom = 4 << 20;
// Runs at least this long are streamed also when they do not begin and end on a line.
constexpr uint64_t kStreamLongRun = 1024;
// How far ahead of the copy the source is asked for: at 10 GB/s a latency of 100 ns is 1 KiB.
constexpr uint64_t kPrefetchBytes = 2048;
constexpr uint64_t kMaxPrefetchRuns = 16;
// Inside a page the processor's own prefetchers see ahead: for runs up to this only the runs that
// follow are asked for (at 4 KiB, asking for the rest of the same run as well made it 10% slower).
constexpr uint64_t kShortRun = 4096;

struct Job;
using CopyUnitsFn = void (*)(const Job& job, uint64_t begin, uint64_t end);

// One box with its addresses, cut into units: runs, or pieces of long runs. Units are numbered in
// copy order.
struct Job {
  const std::byte* src = nullptr;  // of block 0
  std::byte* dst = nullptr;
  int64_t src_block_stride = 0;
  int64_t dst_block_stride = 0;
  const BlockPair* pairs = nullptr;
  CopyDim outer;
  CopyDim inner;
  uint64_t run_bytes = 0;
  uint64_t pieces = 1;      // per run
  uint64_t first_byte = 0;  // bytes of the jobs before
  uint64_t bytes = 0;
  CopyUnitsFn copy_units = nullptr;

  // The unit that holds byte `offset` of the job; the number of units at its end.
  uint64_t UnitAt(uint64_t offset) const {
    return offset / run_bytes * pieces + offset % run_bytes / kPiece;
  }
  // The same box without its inner dimension.
  Job Groups() const {
    Job groups = *this;
    groups.inner.count = 1;
    return groups;
  }
};

// Walks a job's units in order.
class Cursor {
 public:
  Cursor(const Job& job, uint64_t unit) : job_(&job) {
    piece_ = unit % job.pieces;
    unit /= job.pieces;
    inner_ = unit % job.inner.count;
    unit /= job.inner.count;
    outer_ = unit % job.outer.count;
    pair_ = unit / job.outer.count;
    Locate();
  }

  const std::byte* src() const { return src_ + piece_ * kPiece; }
  std::byte* dst() const { return dst_ + piece_ * kPiece; }
  uint64_t bytes() const { return std::min(kPiece, job_->run_bytes - piece_ * kPiece); }
  // Not past the last unit.
  void Next() {
    if (++piece_ < job_->pieces) return;
    piece_ = 0;
    src_ += job_->inner.src_stride;
    dst_ += job_->inner.dst_stride;
    if (++inner_ < job_->inner.count) return;
    inner_ = 0;
    if (++outer_ == job_->outer.count) {
      outer_ = 0;
      ++pair_;
    }
    Locate();
  }

 private:
  void Locate() {
    const BlockPair pair = job_->pairs[pair_];
    const auto outer = static_cast<int64_t>(outer_);
    const auto inner = static_cast<int64_t>(inner_);
    src_ = job_->src + pair.src * job_->src_block_stride + outer * job_->outer.src_stride +
           inner * job_->inner.src_stride;
    dst_ = job_->dst + pair.dst * job_->dst_block_stride + outer * job_->outer.dst_stride +
           inner * job_->inner.dst_stride;
  }

  const Job* job_;
  uint64_t pair_ = 0;
  uint64_t outer_ = 0;
  uint64_t inner_ = 0;
  uint64_t piece_ = 0;
  const std::byte* src_ = nullptr;  // of the run
  std::byte* dst_ = nullptr;
};

ptrdiff_t Distance(const std::byte* from, const std::byte* to) {
  return static_cast<ptrdiff_t>(reinterpret_cast<uintptr_t>(to) -
                                reinterpret_cast<uintptr_t>(from));
}

// The two racing functions: they read source bytes that their owner may be writing.
//
// Runs longer than a page: each asks for its own bytes, and towards its end for the next one's.
template <typename Isa, bool kStream>
__attribute__((no_sanitize("thread"))) void CopyLongRuns(const Job& job, uint64_t begin,
                                                         uint64_t end) {
  Cursor now(job, begin);
  Cursor next = now;
  for (uint64_t unit = begin; unit < end; ++unit) {
    if (unit + 1 < end) next.Next();
    uint64_t split = now.bytes() > kPrefetchBytes ? now.bytes() - kPrefetchBytes : 0;
    split -= std::min(split, reinterpret_cast<uintptr_t>(now.dst() + split) % kLine);
    if (split > 0) CopyRun<Isa, kStream>(now.dst(), now.src(), split, kPrefetchBytes);
    CopyRun<Isa, kStream>(now.dst() + split, now.src() + split, now.bytes() - split,
                          Distance(now.src() + split, next.src()));
    now = next;
  }
  Isa::Finish();
}

// Runs so short that what counts is the work around each: the inner dimension is a plain loop, in
// which the run that is asked for is a constant distance away.
template <typename Isa, bool kStream>
__attribute__((no_sanitize("thread"))) void CopyShortRuns(const Job& job, uint64_t begin,
                                                          uint64_t end) {
  const uint64_t rows = job.inner.count;
  const uint64_t run_bytes = job.run_bytes;
  const int64_t src_stride = job.inner.src_stride;
  const int64_t dst_stride = job.inner.dst_stride;
  const uint64_t ahead_rows = std::clamp<uint64_t>(kPrefetchBytes / run_bytes, 1, kMaxPrefetchRuns);
  // The first rows of a group ask for later rows of it, the last ones for those of the next group;
  // where a group is shorter than the distance, each row asks for the same row some groups ahead.
  const uint64_t ahead_groups = (ahead_rows + rows - 1) / rows;
  const uint64_t near_rows = ahead_groups == 1 ? rows - ahead_rows : 0;
  const ptrdiff_t near = static_cast<int64_t>(ahead_rows) * src_stride;
  const ptrdiff_t back = -static_cast<int64_t>(near_rows) * src_stride;

  const Job groups = job.Groups();
  const uint64_t last_group = (end - 1) / rows;
  uint64_t group = begin / rows;
  uint64_t ahead_group = std::min(group + ahead_groups, last_group);
  Cursor now(groups, group);
  Cursor ahead(groups, ahead_group);
  for (uint64_t row = begin % rows;; row = 0) {
    const uint64_t rows_end = group == last_group ? (end - 1) % rows + 1 : rows;
    const std::byte* src = now.src() + static_cast<int64_t>(row) * src_stride;
    std::byte* dst = now.dst() + static_cast<int64_t>(row) * dst_stride;
    for (; row < std::min(near_rows, rows_end); ++row) {
      CopyRun<Isa, kStream>(dst, src, run_bytes, near);
      src += src_stride;
      dst += dst_stride;
    }
    const ptrdiff_t far = Distance(now.src(), ahead.src()) + back;
    for (; row < rows_end; ++row) {
      CopyRun<Isa, kStream>(dst, src, run_bytes, far);
      src += src_stride;
      dst += dst_stride;
    }
    if (group == last_group) break;
    ++group;
    now.Next();
    if (ahead_group < last_group) {
      ++ahead_group;
      ahead.Next();
    }
  }
  Isa::Finish();
}

template <typename Isa>
CopyUnitsFn Choose(bool is_short, bool stream) {
  if (is_short) return stream ? CopyShortRuns<Isa, true> : CopyShortRuns<Isa, false>;
  return stream ? CopyLongRuns<Isa, true> : CopyLongRuns<Isa, false>;
}

CopyUnitsFn ChooseForThisMachine(bool is_short, bool stream) {
#if defined(__x86_64__)
  static const bool avx2 = HasAvx2();
  return avx2 ? Choose<internal::Avx2>(is_short, stream) : Choose<internal::Sse2>(is_short, stream);
#else
  return Choose<internal::Portable>(is_short, stream);
#endif
}

// Whether every run of the box fills whole lines of the destination.
bool FillsLines(const CopyPlan& plan, const CopyBox& box, const std::byte* base) {
  const uint64_t all = reinterpret_cast<uintptr_t>(base) | static_cast<uint64_t>(box.dst_offset) |
                       plan.dst_block_stride | static_cast<uint64_t>(box.outer.dst_stride) |
                       static_cast<uint64_t>(box.inner.dst_stride) | box.run_bytes;
  return all % kLine == 0;
}

}  // namespace

void ExecuteCopy(const CopyPlan& plan, std::span<const std::byte* const> src_regions,
                 std::span<std::byte* const> dst_regions) {
  const uint64_t total = plan.bytes();
  std::vector<Job> jobs;
  jobs.reserve(plan.boxes.size());
  uint64_t first_byte = 0;
  for (const CopyBox& box : plan.boxes) {
    std::byte* const dst = dst_regions[box.dst_region];
    Job job;
    job.src = src_regions[box.src_region] + box.src_offset;
    job.dst = dst + box.dst_offset;
    job.src_block_stride = static_cast<int64_t>(plan.src_block_stride);
    job.dst_block_stride = static_cast<int64_t>(plan.dst_block_stride);
    job.pairs = plan.pairs.data() + box.first_pair;
    job.outer = box.outer;
    job.inner = box.inner;
    job.run_bytes = box.run_bytes;
    job.pieces = (box.run_bytes + kPiece - 1) / kPiece;
    job.first_byte = first_byte;
    job.bytes = box.bytes();
    job.copy_units = ChooseForThisMachine(
        box.run_bytes <= kShortRun,
        total >= kStreamFrom && (box.run_bytes >= kStreamLongRun || FillsLines(plan, box, dst)));
    first_byte += job.bytes;
    jobs.push_back(job);
  }

  const auto copy_bytes = [&jobs](uint64_t begin, uint64_t end) {
    auto job = std::upper_bound(jobs.begin(), jobs.end(), begin,
                                [](uint64_t at, const Job& job) { return at < job.first_byte; });
    for (--job; job != jobs.end() && job->first_byte < end; ++job) {
      const uint64_t from = job->UnitAt(std::max(begin, job->first_byte) - job->first_byte);
      const uint64_t to = job->UnitAt(std::min(end - job->first_byte, job->bytes));
      if (from < to) job->copy_units(*job, from, to);
    }
  };
  if (total <= kSerial) {
    if (total > 0) copy_bytes(0, total);
    return;
  }
  const auto threads = static_cast<uint64_t>(Parallelism());
  const uint64_t part = std::clamp(total / (threads * 4), kPart, kPart * 16);
  ParallelFor(total, part, copy_bytes);
}

}  // namespace kvrelay
