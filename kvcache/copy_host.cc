#include "kvcache/copy_host.h"

#include <algorithm>
#include <vector>

#include "base/cpu.h"
#include "base/parallel.h"
#include "kvcache/copy_host_cast.h"
#include "kvcache/copy_host_run.h"

namespace kvrelay {
namespace {

using internal::Ahead;
using internal::CopyRun;
using internal::kLine;

// A run longer than this is copied in pieces, so that threads can share it.
constexpr uint64_t kPiece = 256 << 10;
// Plans over this are shared among threads (a start costs about 5 us, a MiB 60 to 250), in parts of
// about kPart at least: so many that a thread that comes late, or is slowed down, costs little.
constexpr uint64_t kSerial = 1 << 20;
constexpr uint64_t kPart = 256 << 10;
constexpr uint64_t kPartsPerThread = 16;
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
// In a place of fewer segments too few of them have a next one to ask for.
constexpr uint32_t kManySegments = 64;
constexpr uint64_t kCastBuffer = 4096;

struct Job;
using CopyUnitsFn = void (*)(const Job& job, uint64_t begin, uint64_t end);

// One box, cut into units: runs, or pieces of long runs. Units are numbered in plan order.
struct Job {
  const CopyPlace* places = nullptr;
  const CopySegment* segments = nullptr;
  const float* factors = nullptr;         // of a cast
  internal::ConvertFn convert = nullptr;  // of a cast
  const std::byte* const* src_regions = nullptr;
  std::byte* const* dst_regions = nullptr;
  CopyBox box;
  uint64_t piece_bytes = kPiece;      // in the destination
  uint64_t src_piece_bytes = kPiece;  // in the source
  uint64_t pieces = 1;                // per run
  uint64_t first_byte = 0;            // bytes of the jobs before
  uint64_t bytes = 0;
  CopyUnitsFn copy_units = nullptr;

  // The unit that holds byte `offset` of the job; the number of units at its end.
  uint64_t UnitAt(uint64_t offset) const {
    return offset / box.run_bytes * pieces + offset % box.run_bytes / piece_bytes;
  }
  // Where a unit begins: the reverse.
  uint64_t ByteOf(uint64_t unit) const {
    return unit / pieces * box.run_bytes + unit % pieces * piece_bytes;
  }
  const std::byte* PlaceSrc(uint64_t place) const {
    return src_regions[places[place].src_region] + places[place].src_offset;
  }
  std::byte* PlaceDst(uint64_t place) const {
    return dst_regions[places[place].dst_region] + places[place].dst_offset;
  }
  // The same box without its inner dimension.
  Job Groups() const {
    Job groups = *this;
    groups.box.inner.count = 1;
    return groups;
  }
};

// Walks a job's units in order.
class Cursor {
 public:
  Cursor(const Job& job, uint64_t unit) : job_(&job) {
    const CopyBox& box = job.box;
    piece_ = unit % job.pieces;
    unit /= job.pieces;
    inner_ = static_cast<uint32_t>(unit % box.inner.count);
    unit /= box.inner.count;
    outer_ = static_cast<uint32_t>(unit % box.outer.count);
    unit /= box.outer.count;
    segment_ = static_cast<uint32_t>(unit % box.num_segments);
    place_ = static_cast<uint32_t>(unit / box.num_segments);
    EnterPlace();
    Locate();
  }

  const std::byte* src() const { return src_ + piece_ * job_->src_piece_bytes; }
  std::byte* dst() const { return dst_ + piece_ * job_->piece_bytes; }
  uint64_t bytes() const {  // in the destination
    return std::min(job_->piece_bytes, job_->box.run_bytes - piece_ * job_->piece_bytes);
  }
  float factor() const {
    const CopyCast& cast = job_->box.cast;
    return job_->factors[uint64_t{place_} * cast.place_step + uint64_t{outer_} * cast.outer_step +
                         uint64_t{inner_} * cast.inner_step];
  }
  // Not past the last unit.
  void Next() {
    if (++piece_ < job_->pieces) return;
    piece_ = 0;
    src_ += job_->box.inner.src_stride;
    dst_ += job_->box.inner.dst_stride;
    if (++inner_ < job_->box.inner.count) return;
    inner_ = 0;
    if (++outer_ == job_->box.outer.count) {
      outer_ = 0;
      if (++segment_ == job_->box.num_segments) {
        segment_ = 0;
        ++place_;
        EnterPlace();
      }
    }
    Locate();
  }

 private:
  void EnterPlace() {
    place_src_ = job_->PlaceSrc(place_);
    place_dst_ = job_->PlaceDst(place_);
  }
  void Locate() {
    const CopySegment& segment = job_->segments[segment_];
    const CopyBox& box = job_->box;
    src_ = place_src_ + segment.src + outer_ * box.outer.src_stride + inner_ * box.inner.src_stride;
    dst_ = place_dst_ + segment.dst + outer_ * box.outer.dst_stride + inner_ * box.inner.dst_stride;
  }

  const Job* job_;
  uint32_t place_ = 0;
  uint32_t segment_ = 0;
  uint32_t outer_ = 0;
  uint32_t inner_ = 0;
  uint64_t piece_ = 0;
  const std::byte* place_src_ = nullptr;
  std::byte* place_dst_ = nullptr;
  const std::byte* src_ = nullptr;  // of the run
  std::byte* dst_ = nullptr;
};

ptrdiff_t Distance(const std::byte* from, const std::byte* to) {
  return static_cast<ptrdiff_t>(reinterpret_cast<uintptr_t>(to) -
                                reinterpret_cast<uintptr_t>(from));
}

// The racing functions: they read source bytes that their owner may be writing.
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
    if (split > 0) {
      CopyRun<Isa, kStream>(now.dst(), now.src(), split, {kPrefetchBytes, kPrefetchBytes});
    }
    CopyRun<Isa, kStream>(
        now.dst() + split, now.src() + split, now.bytes() - split,
        {Distance(now.src() + split, next.src()), Distance(now.dst() + split, next.dst())});
    now = next;
  }
  Isa::Finish();
}

// How many runs ahead of the copy the memory is asked for.
uint64_t RunsAhead(uint64_t run_bytes) {
  return std::clamp<uint64_t>(kPrefetchBytes / run_bytes, 1, kMaxPrefetchRuns);
}

// Runs so short that what counts is the work around each, a run to a segment.
template <typename Isa, bool kStream>
__attribute__((no_sanitize("thread"))) void CopySegments(const Job& job, uint64_t begin,
                                                         uint64_t end) {
  const uint64_t run_bytes = job.box.run_bytes;
  const uint64_t num_segments = job.box.num_segments;
  const uint64_t ahead = RunsAhead(run_bytes);
  const CopySegment* const segments = job.segments;
  while (begin < end) {
    const uint64_t place = begin / num_segments;
    const uint64_t first = begin % num_segments;
    const uint64_t last = std::min(num_segments, first + end - begin) - 1;
    const std::byte* const src = job.PlaceSrc(place);
    std::byte* const dst = job.PlaceDst(place);
    for (uint64_t i = first; i <= last; ++i) {
      const CopySegment now = segments[i];
      const CopySegment next = segments[std::min(i + ahead, last)];
      CopyRun<Isa, kStream>(
          dst + now.dst, src + now.src, run_bytes,
          {static_cast<ptrdiff_t>(next.src - now.src), static_cast<ptrdiff_t>(next.dst - now.dst)});
    }
    begin += last + 1 - first;
  }
  Isa::Finish();
}

// The same of several runs to a segment: the inner dimension is a plain loop, in which the run that
// is asked for is a constant distance away.
template <typename Isa, bool kStream>
__attribute__((no_sanitize("thread"))) void CopyShortRuns(const Job& job, uint64_t begin,
                                                          uint64_t end) {
  const uint64_t rows = job.box.inner.count;
  const uint64_t run_bytes = job.box.run_bytes;
  const auto src_stride = static_cast<int64_t>(job.box.inner.src_stride);
  const auto dst_stride = static_cast<int64_t>(job.box.inner.dst_stride);
  const uint64_t ahead_rows = RunsAhead(run_bytes);
  // The first rows of a group ask for later rows of it, the last ones for those of the next group;
  // where a group is shorter than the distance, each row asks for the same row some groups ahead.
  const uint64_t ahead_groups = (ahead_rows + rows - 1) / rows;
  const uint64_t near_rows = ahead_groups == 1 ? rows - ahead_rows : 0;
  const auto rows_away = [&](uint64_t count) {
    return Ahead{static_cast<int64_t>(count) * src_stride,
                 static_cast<int64_t>(count) * dst_stride};
  };
  const Ahead near = rows_away(ahead_rows);
  const Ahead back = rows_away(near_rows);

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
    const Ahead far = {Distance(now.src(), ahead.src()) - back.src,
                       Distance(now.dst(), ahead.dst()) - back.dst};
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

// Racing, too, with the conversions that it calls. Where the copy is streamed a part
// of a run is converted into a buffer that stays in the first cache, and streamed out of it.
template <typename Isa, bool kStream>
__attribute__((no_sanitize("thread"))) void CastRuns(const Job& job, uint64_t begin, uint64_t end) {
  alignas(kLine) std::byte buffer[kCastBuffer];
  const uint64_t from_size = SizeOf(job.box.cast.from);
  const uint64_t to_size = SizeOf(job.box.cast.to);
  Cursor now(job, begin);
  Cursor next = now;
  for (uint64_t unit = begin; unit < end; ++unit) {
    if (unit + 1 < end) next.Next();
    const uint64_t elements = now.bytes() / to_size;
    const float factor = now.factor();
    const uint64_t asked = std::min(elements * from_size, kPrefetchBytes);
    for (uint64_t at = 0; at < asked; at += kLine) __builtin_prefetch(next.src() + at);
    if (kStream) {
      for (uint64_t done = 0; done < elements;) {
        const uint64_t part = std::min(elements - done, kCastBuffer / to_size);
        job.convert(now.src() + done * from_size, buffer, part, factor);
        CopyRun<Isa, true>(now.dst() + done * to_size, buffer, part * to_size, {});
        done += part;
      }
    } else {
      job.convert(now.src(), now.dst(), elements, factor);
    }
    now = next;
  }
  Isa::Finish();
}

enum class Way { kSegments, kShortRuns, kLongRuns, kCast };

template <typename Isa>
CopyUnitsFn Choose(Way way, bool stream) {
  if (way == Way::kCast) return stream ? CastRuns<Isa, true> : CastRuns<Isa, false>;
  if (way == Way::kSegments) return stream ? CopySegments<Isa, true> : CopySegments<Isa, false>;
  if (way == Way::kShortRuns) return stream ? CopyShortRuns<Isa, true> : CopyShortRuns<Isa, false>;
  return stream ? CopyLongRuns<Isa, true> : CopyLongRuns<Isa, false>;
}

CopyUnitsFn ChooseForThisMachine(Way way, bool stream) {
#if defined(__x86_64__)
  static const bool avx512 = HasAvx512();
  static const bool avx2 = HasAvx2();
  if (avx512) return Choose<internal::Avx512>(way, stream);
  return avx2 ? Choose<internal::Avx2>(way, stream) : Choose<internal::Sse2>(way, stream);
#else
  return Choose<internal::Portable>(way, stream);
#endif
}

// Whether every run of the box fills whole lines of the destination.
bool FillsLines(const CopyPlan& plan, const CopyBox& box, std::span<std::byte* const> dst_regions) {
  uint64_t all = box.outer.dst_stride | box.inner.dst_stride | box.run_bytes;
  for (const CopyPlace& place : std::span(plan.places).subspan(box.first_place, box.num_places)) {
    all |= reinterpret_cast<uintptr_t>(dst_regions[place.dst_region]) | place.dst_offset;
  }
  for (const CopySegment& segment :
       std::span(plan.segments).subspan(box.first_segment, box.num_segments)) {
    all |= segment.dst;
  }
  return all % kLine == 0;
}

// The jobs of a plan, and its bytes numbered over all of them.
class Jobs {
 public:
  // `whole_bytes`: of the copy that the plan is a part of.
  Jobs(const CopyPlan& plan, std::span<const std::byte* const> src_regions,
       std::span<std::byte* const> dst_regions, uint64_t whole_bytes)
      : total_(plan.bytes()) {
    const bool large = std::max(total_, whole_bytes) >= kStreamFrom;
    jobs_.reserve(plan.boxes.size());
    uint64_t first_byte = 0;
    for (const CopyBox& box : plan.boxes) {
      Job job;
      job.places = plan.places.data() + box.first_place;
      job.segments = plan.segments.data() + box.first_segment;
      job.src_regions = src_regions.data();
      job.dst_regions = dst_regions.data();
      job.box = box;
      job.pieces = (box.run_bytes + kPiece - 1) / kPiece;
      job.first_byte = first_byte;
      job.bytes = box.bytes();
      Way way = Way::kLongRuns;
      if (box.run_bytes <= kShortRun) {
        const bool run_to_segment = box.outer.count == 1 && box.inner.count == 1;
        way =
            run_to_segment && box.num_segments >= kManySegments ? Way::kSegments : Way::kShortRuns;
      }
      if (box.casts) {
        way = Way::kCast;
        job.factors = plan.factors.data() + box.cast.first_factor;
        job.src_piece_bytes = kPiece / SizeOf(box.cast.to) * SizeOf(box.cast.from);
        job.convert = internal::ConvertIsas()[0].function(box.cast.from, box.cast.to);
      }
      job.copy_units = ChooseForThisMachine(
          way, large && (box.run_bytes >= kStreamLongRun || FillsLines(plan, box, dst_regions)));
      first_byte += job.bytes;
      jobs_.push_back(job);
    }
  }

  uint64_t total() const { return total_; }

  // The last position at or before `position` where a unit begins, or the end.
  uint64_t UnitBegin(uint64_t position) const {
    if (position >= total_) return total_;
    const Job& job = *JobAt(position);
    return job.first_byte + job.ByteOf(job.UnitAt(position - job.first_byte));
  }
  uint64_t UnitEnd(uint64_t begin) const {
    const Job& job = *JobAt(begin);
    return job.first_byte + std::min(job.bytes, job.ByteOf(job.UnitAt(begin - job.first_byte) + 1));
  }
  // The destination of the unit that holds byte `position`.
  const std::byte* DestinationAt(uint64_t position) const {
    const Job& job = *JobAt(position);
    return Cursor(job, job.UnitAt(position - job.first_byte)).dst();
  }
  // All units that begin in [begin, end).
  void Copy(uint64_t begin, uint64_t end) const {
    for (auto job = JobAt(begin); job != jobs_.end() && job->first_byte < end; ++job) {
      const uint64_t from = UnitFrom(*job, std::max(begin, job->first_byte) - job->first_byte);
      const uint64_t to = UnitFrom(*job, std::min(end - job->first_byte, job->bytes));
      if (from < to) job->copy_units(*job, from, to);
    }
  }

 private:
  std::vector<Job>::const_iterator JobAt(uint64_t position) const {
    return std::upper_bound(jobs_.begin(), jobs_.end(), position,
                            [](uint64_t at, const Job& job) { return at < job.first_byte; }) -
           1;
  }
  // The first unit that begins at `offset` or behind it.
  static uint64_t UnitFrom(const Job& job, uint64_t offset) {
    const uint64_t unit = job.UnitAt(offset);
    return job.ByteOf(unit) < offset ? unit + 1 : unit;
  }

  std::vector<Job> jobs_;
  uint64_t total_;
};

void CopyOnThreads(const Jobs& jobs, uint64_t begin, uint64_t end) {
  if (begin == end) return;
  if (end - begin <= kSerial) return jobs.Copy(begin, end);
  const auto threads = static_cast<uint64_t>(Parallelism());
  const uint64_t part = std::clamp((end - begin) / (threads * kPartsPerThread), kPart, kPart * 16);
  ParallelForNear(
      end - begin, part, [&](uint64_t from) { return jobs.DestinationAt(begin + from); },
      [&](uint64_t from, uint64_t to) { jobs.Copy(begin + from, begin + to); });
}

}  // namespace

void ExecuteCopy(const CopyPlan& plan, std::span<const std::byte* const> src_regions,
                 std::span<std::byte* const> dst_regions, uint64_t whole_bytes) {
  const Jobs jobs(plan, src_regions, dst_regions, whole_bytes);
  CopyOnThreads(jobs, 0, jobs.total());
}

uint64_t ExecuteCopyPart(const CopyPlan& plan, uint64_t position, uint64_t max_bytes,
                         std::span<const std::byte* const> src_regions,
                         std::span<std::byte* const> dst_regions) {
  const Jobs jobs(plan, src_regions, dst_regions, /*whole_bytes=*/0);
  if (position >= jobs.total()) return jobs.total();
  const uint64_t end = max_bytes >= jobs.total() - position
                           ? jobs.total()
                           : std::max(jobs.UnitBegin(position + max_bytes), jobs.UnitEnd(position));
  CopyOnThreads(jobs, position, end);
  return end;
}

}  // namespace kvrelay
