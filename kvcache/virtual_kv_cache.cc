#include "kvcache/virtual_kv_cache.h"

#include <pthread.h>

#include <algorithm>
#include <limits>
#include <utility>

namespace kvrelay {
namespace {

// What one thread maps before others get the lock: about a millisecond.
constexpr uint64_t kRunBytes = uint64_t{2} << 20;
constexpr uint32_t kNone = std::numeric_limits<uint32_t>::max();

// Of all ranges.
uint64_t TokenBytes(const VirtualLayout& layout) { return layout.kv.token_stride * layout.ranges; }
uint64_t PageBytes(const VirtualLayout& layout) { return layout.page_bytes * layout.ranges; }

double Mb(uint64_t bytes) { return static_cast<double>(bytes) / (1 << 20); }
double Part(uint64_t part, uint64_t whole) {
  return whole == 0 ? 0 : static_cast<double>(part) / static_cast<double>(whole);
}

}  // namespace

Result<std::unique_ptr<VirtualKvCache>> VirtualKvCache::Create(std::vector<Rank> ranks) {
  if (ranks.empty()) return Error(Code::kInvalidArgument, "a virtual KV cache without ranks");
  std::vector<RankState> states;
  for (Rank& rank : ranks) {
    const VirtualLayout& first = ranks.front().layout;
    if (rank.layout.rows != first.rows || rank.layout.row_blocks != first.row_blocks ||
        rank.layout.max_seq_len != first.max_seq_len ||
        rank.layout.kv.block_size != first.kv.block_size) {
      return Error(Code::kInvalidArgument, "ranks of a virtual KV cache with different rows");
    }
    if (rank.pages->page_bytes() != rank.layout.page_bytes ||
        rank.pages->bytes() < rank.layout.bytes()) {
      return Error(Code::kInvalidArgument,
                   "a virtual KV cache of " + std::to_string(rank.layout.bytes()) +
                       " bytes in pages of " + std::to_string(rank.layout.page_bytes) + " on " +
                       std::to_string(rank.pages->bytes()) + " bytes in pages of " +
                       std::to_string(rank.pages->page_bytes()));
    }
  }
  states.reserve(ranks.size());
  for (Rank& rank : ranks) states.push_back({.rank = std::move(rank)});
  return std::unique_ptr<VirtualKvCache>(new VirtualKvCache(std::move(states)));
}

VirtualKvCache::VirtualKvCache(std::vector<RankState> ranks)
    : ranks_(std::move(ranks)),
      rows_(layout().rows, Row{.mapped = std::vector<uint64_t>(ranks_.size())}),
      free_rows_(layout().rows),
      thread_([this] { Loop(); }) {}

VirtualKvCache::~VirtualKvCache() {
  {
    const std::lock_guard lock(mutex_);
    stop_ = true;
  }
  work_.notify_all();
  thread_.join();
}

Status VirtualKvCache::ReservePhysicalPages(uint64_t bytes) {
  const std::lock_guard lock(mutex_);
  if (std::exchange(reserved_, true)) {
    return {Code::kInvalidArgument, "the pages of a virtual KV cache are reserved once"};
  }
  uint64_t token_bytes = 0;
  for (const RankState& rank : ranks_) token_bytes += TokenBytes(rank.rank.layout);
  for (RankState& rank : ranks_) {
    const VirtualLayout& layout = rank.rank.layout;
    const uint64_t own = TokenBytes(layout);
    const uint64_t share = bytes / token_bytes * own + bytes % token_bytes * own / token_bytes;
    rank.pool = std::min(share / PageBytes(layout), layout.rows * layout.row_pages());
    if (rank.pool == 0) {
      return {Code::kInvalidArgument, "a pool of " + std::to_string(share) +
                                          " bytes holds no page of each of " +
                                          std::to_string(layout.ranges) + " ranges, " +
                                          std::to_string(PageBytes(layout)) + " bytes"};
    }
    KVRELAY_RETURN_IF_ERROR(rank.rank.pages->Reserve(rank.pool * layout.ranges));
  }
  return Status::Ok();
}

Status VirtualKvCache::Shortage(uint32_t rank, uint64_t pages) const {
  const RankState& state = ranks_[rank];
  const uint64_t ranges = state.rank.layout.ranges;
  return {Code::kResourceExhausted,
          "asked for " + std::to_string(pages * ranges) + " pages of " +
              std::to_string(state.rank.layout.page_bytes) + " bytes, " +
              std::to_string((state.pool - state.promised) * ranges) + " of " +
              std::to_string(state.pool * ranges) + " are free" +
              (ranks_.size() > 1 ? " on rank " + std::to_string(rank) : "")};
}

// The freed row with the fewest pages that do for `tokens`, else the one with the most.
uint32_t VirtualKvCache::BestRow(uint32_t tokens) const {
  const uint64_t need = layout().PagesFor(tokens);
  uint32_t best = kNone;
  for (uint32_t i = 0; i < rows_.size(); ++i) {
    if (rows_[i].live) continue;
    if (best == kNone) {
      best = i;
      continue;
    }
    const uint64_t pages = rows_[i].mapped[0];
    const uint64_t least = rows_[best].mapped[0];
    if (least >= need ? pages >= need && pages < least : pages > least) best = i;
  }
  return best;
}

void VirtualKvCache::SetPromise(Row& row, uint32_t tokens) {
  for (RankState& rank : ranks_) {
    rank.promised += rank.rank.layout.PagesFor(tokens);
    rank.promised -= rank.rank.layout.PagesFor(row.promised);
  }
  row.promised = tokens;
}

Result<uint32_t> VirtualKvCache::AllocNewBatchIdx(uint32_t seq_len, uint32_t promised) {
  const uint32_t expected = promised == 0 ? layout().max_seq_len : promised;
  promised = std::max(promised, seq_len);
  if (promised > layout().max_seq_len) {
    return Error(Code::kTooLarge, "a sequence of " + std::to_string(promised) +
                                      " tokens, rows hold " + std::to_string(layout().max_seq_len));
  }
  Lock lock(mutex_);
  for (uint32_t i = 0; i < ranks_.size(); ++i) {
    const uint64_t pages = ranks_[i].rank.layout.PagesFor(promised);
    if (pages > ranks_[i].pool - ranks_[i].promised) return Error(Shortage(i, pages));
  }
  const uint32_t index = BestRow(promised);
  if (index == kNone) {
    return Error(Code::kResourceExhausted,
                 "asked for a row, 0 of " + std::to_string(rows_.size()) + " are free");
  }
  Row& row = rows_[index];
  row.live = true;
  row.expected = expected;
  row.turn = ++turns_;
  --free_rows_;
  SetPromise(row, promised);
  for (uint32_t i = 0; i < ranks_.size(); ++i) {
    const VirtualLayout& own = ranks_[i].rank.layout;
    counts_.pages_reused += std::min(row.mapped[i], own.PagesFor(promised)) * own.ranges;
  }
  if (Status status = MapRow(lock, index, seq_len, false); !status.ok()) {
    lock.unlock();
    KVRELAY_RETURN_IF_ERROR(FreeBatchIdx(index));
    return Error(std::move(status));
  }
  row.tokens = seq_len;
  return index;
}

Status VirtualKvCache::FreeBatchIdx(uint32_t row) {
  const std::lock_guard lock(mutex_);
  if (row >= rows_.size() || !rows_[row].live) {
    return {Code::kInvalidArgument, "row " + std::to_string(row) + " is not in use"};
  }
  rows_[row].live = false;
  rows_[row].turn = ++turns_;
  rows_[row].tokens = 0;
  SetPromise(rows_[row], 0);
  ++free_rows_;
  return Status::Ok();
}

void VirtualKvCache::Shrink(uint32_t row, uint32_t tokens) {
  const std::lock_guard lock(mutex_);
  SetPromise(rows_[row], std::min(rows_[row].promised, tokens));
  rows_[row].tokens = std::min(rows_[row].tokens, tokens);
}

Status VirtualKvCache::CheckStep(std::span<const uint32_t> seq_lens) const {
  if (seq_lens.size() > rows_.size()) {
    return {Code::kInvalidArgument, "a step of " + std::to_string(seq_lens.size()) +
                                        " rows, there are " + std::to_string(rows_.size())};
  }
  for (uint32_t i = 0; i < seq_lens.size(); ++i) {
    if (seq_lens[i] == 0) continue;
    if (!rows_[i].live) {
      return {Code::kInvalidArgument, "row " + std::to_string(i) + " is not in use"};
    }
    if (seq_lens[i] > layout().max_seq_len) {
      return {Code::kTooLarge, "a sequence of " + std::to_string(seq_lens[i]) +
                                   " tokens, rows hold " + std::to_string(layout().max_seq_len)};
    }
  }
  return Status::Ok();
}

// All rows or none.
Status VirtualKvCache::Promise(std::span<const uint32_t> seq_lens) {
  for (uint32_t i = 0; i < ranks_.size(); ++i) {
    const VirtualLayout& own = ranks_[i].rank.layout;
    uint64_t more = 0;
    for (uint32_t row = 0; row < seq_lens.size(); ++row) {
      const uint32_t promised = rows_[row].promised;
      more += own.PagesFor(std::max(promised, seq_lens[row])) - own.PagesFor(promised);
    }
    if (more > ranks_[i].pool - ranks_[i].promised) return Shortage(i, more);
  }
  for (uint32_t row = 0; row < seq_lens.size(); ++row) {
    SetPromise(rows_[row], std::max(rows_[row].promised, seq_lens[row]));
  }
  return Status::Ok();
}

Status VirtualKvCache::StepLocked(Lock& lock, std::span<const uint32_t> seq_lens) {
  KVRELAY_RETURN_IF_ERROR(CheckStep(seq_lens));
  KVRELAY_RETURN_IF_ERROR(Promise(seq_lens));
  for (uint32_t row = 0; row < seq_lens.size(); ++row) {
    if (seq_lens[row] == 0) continue;
    KVRELAY_RETURN_IF_ERROR(MapRow(lock, row, seq_lens[row], false));
    rows_[row].tokens = seq_lens[row];
  }
  return Status::Ok();
}

Status VirtualKvCache::Step(std::span<const uint32_t> seq_lens) {
  Lock lock(mutex_);
  return StepLocked(lock, seq_lens);
}

Status VirtualKvCache::Extend(uint32_t row, uint32_t seq_len) {
  if (row >= layout().rows) {
    return {Code::kInvalidArgument, "row " + std::to_string(row) + " is not in use"};
  }
  std::vector<uint32_t> seq_lens(row + size_t{1});
  seq_lens[row] = seq_len;
  return Step(seq_lens);
}

Status VirtualKvCache::StepAsync(std::span<const uint32_t> seq_lens) {
  Lock lock(mutex_);
  KVRELAY_RETURN_IF_ERROR(CheckStep(seq_lens));
  std::vector<Ahead> ahead;
  for (uint32_t row = 0; row < seq_lens.size(); ++row) {
    if (seq_lens[row] == 0) continue;
    const uint32_t now = seq_lens[row];
    const uint32_t added = std::max(now, rows_[row].tokens + 1) - rows_[row].tokens;
    const uint32_t most = std::max(now, rows_[row].expected);
    const uint32_t target = now + std::min(added, most - now);
    if (target > now) ahead.push_back({.row = row, .turn = rows_[row].turn, .tokens = target});
  }
  KVRELAY_RETURN_IF_ERROR(StepLocked(lock, seq_lens));
  ahead_ = std::move(ahead);
  lock.unlock();
  work_.notify_one();
  return Status::Ok();
}

void VirtualKvCache::WaitForBackground() {
  Lock lock(mutex_);
  idle_.wait(lock, [this] { return !busy_ && ahead_.empty(); });
}

// Until the row's first `tokens` have pages on every rank. Needed ones are promised, so others'
// spare ones are taken for them; ahead of need only free rows' are, and it ends when the row is
// freed.
Status VirtualKvCache::MapRow(Lock& lock, uint32_t row, uint32_t tokens, bool ahead) {
  const uint64_t turn = rows_[row].turn;
  for (uint32_t i = 0; i < ranks_.size(); ++i) {
    RankState& rank = ranks_[i];
    const uint64_t target = rank.rank.layout.PagesFor(tokens);
    const uint64_t most = std::max<uint64_t>(1, kRunBytes / PageBytes(rank.rank.layout));
    while (rows_[row].turn == turn && rows_[row].mapped[i] < target) {
      const uint64_t run = std::min(most, target - rows_[row].mapped[i]);
      if (const uint64_t room = rank.pool - rank.mapped; room < run) {
        (void)Reclaim(i, run - room, !ahead);
      }
      const uint64_t count = std::min(run, rank.pool - rank.mapped);
      if (count == 0) return Shortage(i, run);
      KVRELAY_RETURN_IF_ERROR(MapRun(i, row, count));
      if (ahead) counts_.pages_mapped_ahead += count * rank.rank.layout.ranges;
      lock.unlock();
      lock.lock();
    }
  }
  return Status::Ok();
}

// The next `count` pages of the row, in all ranges or none.
Status VirtualKvCache::MapRun(uint32_t rank, uint32_t row, uint64_t count) {
  const auto& [layout, pages] = ranks_[rank].rank;
  uint64_t& mapped = rows_[row].mapped[rank];
  for (uint32_t range = 0; range < layout.ranges; ++range) {
    Status status = pages->Map(layout.FirstPage(range, row) + mapped, count);
    if (status.ok()) continue;
    for (uint32_t done = 0; done < range; ++done) {
      pages->Unmap(layout.FirstPage(done, row) + mapped, count);
    }
    return status;
  }
  mapped += count;
  ranks_[rank].mapped += count;
  counts_.pages_mapped += count * layout.ranges;
  return Status::Ok();
}

// Pages behind a row's promise, up to `count`, for others: of rows that were freed longest ago
// first.
uint64_t VirtualKvCache::Reclaim(uint32_t rank, uint64_t count, bool from_live_rows) {
  uint64_t got = 0;
  while (got < count) {
    uint32_t oldest = kNone;
    for (uint32_t i = 0; i < rows_.size(); ++i) {
      if (rows_[i].live || rows_[i].mapped[rank] == 0) continue;
      if (oldest == kNone || rows_[i].turn < rows_[oldest].turn) oldest = i;
    }
    if (oldest == kNone) break;
    got += TakeBack(rank, oldest, 0, count - got);
  }
  if (!from_live_rows) return got;
  for (uint32_t i = 0; i < rows_.size() && got < count; ++i) {
    const uint64_t keep = ranks_[rank].rank.layout.PagesFor(rows_[i].promised);
    if (rows_[i].mapped[rank] > keep) got += TakeBack(rank, i, keep, count - got);
  }
  return got;
}

// Up to `count` pages from the row's end, and all but `keep`.
uint64_t VirtualKvCache::TakeBack(uint32_t rank, uint32_t row, uint64_t keep, uint64_t count) {
  const auto& [layout, pages] = ranks_[rank].rank;
  uint64_t& mapped = rows_[row].mapped[rank];
  const uint64_t taken = std::min(count, mapped - keep);
  mapped -= taken;
  ranks_[rank].mapped -= taken;
  for (uint32_t range = 0; range < layout.ranges; ++range) {
    pages->Unmap(layout.FirstPage(range, row) + mapped, taken);
  }
  counts_.pages_reclaimed += taken * layout.ranges;
  return taken;
}

// A reader whose lease ended reads on until it looks at the guard again, and gives pages memory
// that had lost it.
void VirtualKvCache::TakeBackStrays() {
  for (uint32_t i = 0; i < ranks_.size(); ++i) {
    const auto& [layout, pages] = ranks_[i].rank;
    const uint64_t mapped = ranks_[i].mapped * PageBytes(layout);
    const uint64_t resident = pages->resident_bytes();
    if (resident <= mapped) continue;
    for (uint32_t row = 0; row < rows_.size(); ++row) {
      const uint64_t own = rows_[row].mapped[i];
      if (own == layout.row_pages()) continue;
      for (uint32_t range = 0; range < layout.ranges; ++range) {
        pages->Unmap(layout.FirstPage(range, row) + own, layout.row_pages() - own);
      }
    }
    counts_.stray_bytes += resident - std::min(resident, pages->resident_bytes());
  }
}

void VirtualKvCache::Loop() {
  ::pthread_setname_np(::pthread_self(), "kvr-pages");
  Lock lock(mutex_);
  while (true) {
    work_.wait(lock, [this] { return stop_ || !ahead_.empty(); });
    if (stop_) return;
    busy_ = true;
    for (const Ahead& ahead : std::exchange(ahead_, {})) {
      if (stop_) return;
      if (rows_[ahead.row].turn != ahead.turn) continue;
      // What it could not get is asked for again by the step that needs it.
      (void)MapRow(lock, ahead.row, ahead.tokens, true);
    }
    TakeBackStrays();
    busy_ = false;
    idle_.notify_all();
  }
}

uint64_t VirtualKvCache::TokensIn(uint32_t rows, bool empty) const {
  uint64_t tokens = std::numeric_limits<uint64_t>::max();
  for (const RankState& rank : ranks_) {
    const VirtualLayout& own = rank.rank.layout;
    const uint64_t pages = rank.pool - (empty ? 0 : rank.promised);
    // Each row but the last may waste almost a page.
    const uint64_t wasted = own.rounds_up() ? std::min<uint64_t>(pages, rows - 1) : 0;
    tokens = std::min(tokens, (pages - wasted) * own.page_bytes / own.kv.token_stride);
  }
  return tokens / layout().kv.block_size * layout().kv.block_size;
}

uint64_t VirtualKvCache::FreeTokens(uint32_t rows) const {
  const std::lock_guard lock(mutex_);
  return rows == 0 || rows > free_rows_ ? 0 : TokensIn(rows, false);
}

uint64_t VirtualKvCache::CapacityTokens(uint32_t rows) const {
  const std::lock_guard lock(mutex_);
  return rows == 0 || rows > rows_.size() ? 0 : TokensIn(rows, true);
}

VirtualKvMetrics VirtualKvCache::metrics() const {
  const std::lock_guard lock(mutex_);
  VirtualKvMetrics metrics = counts_;
  uint64_t baseline = 0;
  uint64_t resident = 0;
  uint64_t pool = 0;
  uint64_t mapped = 0;
  uint64_t touched = 0;  // pages of sequences' tokens
  uint64_t used = 0;     // the tokens themselves
  for (const RankState& rank : ranks_) {
    const VirtualLayout& own = rank.rank.layout;
    baseline += uint64_t{own.rows} * own.max_seq_len * TokenBytes(own);
    resident += rank.rank.pages->resident_bytes();
    pool += rank.pool * PageBytes(own);
    mapped += rank.mapped * PageBytes(own);
    for (const Row& row : rows_) {
      touched += own.PagesFor(row.tokens) * PageBytes(own);
      used += row.tokens * TokenBytes(own);
    }
  }
  const uint64_t saved = baseline - std::min(baseline, resident);
  metrics.baseline_memory_mb = Mb(baseline);
  metrics.optimized_memory_mb = Mb(resident);
  metrics.memory_saved_mb = Mb(saved);
  metrics.memory_savings_percent = 100 * Part(saved, baseline);
  metrics.utilization = Part(used, resident);
  metrics.pool_mb = Mb(pool);
  metrics.cached_mb = Mb(mapped - std::min(mapped, touched));
  metrics.fragmentation = touched == 0 ? 0 : 1 - Part(used, touched);
  return metrics;
}

}  // namespace kvrelay
