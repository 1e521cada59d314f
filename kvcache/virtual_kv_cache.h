// The virtual KV cache (vAttention): every sequence has a row of addresses for its longest length,
// contiguous, and memory only where its tokens are.
//
// Pages come from a pool of fixed size and go back late: a freed row keeps its pages, for whoever
// gets the row next, until others need them. Rows carry a promise of tokens that will never be
// refused a page; what is mapped beyond the promises may be taken at any time.
#pragma once

#include <condition_variable>
#include <cstdint>
#include <memory>
#include <mutex>
#include <span>
#include <string>
#include <thread>
#include <vector>

#include "base/status.h"
#include "kvcache/page_backing.h"
#include "kvcache/virtual_layout.h"

namespace kvrelay {

// Measured when asked for. A MB is 2^20 bytes.
struct VirtualKvMetrics {
  // A static reservation: all rows at their full length.
  double baseline_memory_mb = 0;
  double optimized_memory_mb = 0;  // what has memory now, as the system counts it
  double memory_saved_mb = 0;
  double memory_savings_percent = 0;  // of the baseline
  double utilization = 0;  // of that memory, the part that holds sequences' tokens: 0 to 1

  double pool_mb = 0;         // what at most has memory
  double cached_mb = 0;       // of it in freed rows, and ahead of sequences' ends
  double fragmentation = 0;   // of the pages that sequences touch, the part without tokens: 0 to 1
  uint64_t pages_mapped = 0;  // all of these since the start
  uint64_t pages_mapped_ahead = 0;  // of them on the background thread
  uint64_t pages_reused = 0;        // were still there when a freed row was taken again
  uint64_t pages_reclaimed = 0;
  uint64_t stray_bytes = 0;  // that readers who came too late had given memory, taken back
};

// Any thread. A row is one thread's at a time.
class VirtualKvCache {
 public:
  struct Rank {
    VirtualLayout layout;
    std::shared_ptr<PageBacking> pages;  // nobody else's
  };

  // vAttention's init_kvcache: addresses, no memory. The ranks of one engine share rows, and each
  // has pages of its own (VirtualLayout::Make for all of them together).
  static Result<std::unique_ptr<VirtualKvCache>> Create(std::vector<Rank> ranks);
  // Ends the background thread. Pages keep their memory as long as their backing is there.
  ~VirtualKvCache();

  // reserve_physical_pages, once, before anything else: the pool of all ranks together.
  // kResourceExhausted with the bytes asked and free.
  Status ReservePhysicalPages(uint64_t bytes);

  // alloc_new_batch_idx: a row with pages for `seq_len` tokens. `promised`: what it may grow to and
  // will not pass (0: unknown, and nothing more is promised). The freed row whose pages fit best.
  // kResourceExhausted, with the pages asked and free, when the pool or the rows do not suffice;
  // kTooLarge beyond max_seq_len.
  Result<uint32_t> AllocNewBatchIdx(uint32_t seq_len, uint32_t promised = 0);
  // free_batch_idx. Nobody reads or writes the row any more. Its pages stay for the next.
  Status FreeBatchIdx(uint32_t row);

  // step: before sequences are written up to seq_lens[row] tokens (0: not in this step); their
  // pages have memory when it returns. Beyond a row's promise it may fail with kResourceExhausted,
  // before anything was mapped.
  Status Step(std::span<const uint32_t> seq_lens);
  // step_async: the same, and then the background thread maps ahead, while the step is computed: as
  // many tokens more as this step added, at least one. What it can not map is left to the next
  // step.
  Status StepAsync(std::span<const uint32_t> seq_lens);
  // Step for one row.
  Status Extend(uint32_t row, uint32_t seq_len);
  // The row is neither read nor written behind `tokens` from now on, nor are they promised to it.
  void Shrink(uint32_t row, uint32_t tokens);
  // Until the background thread has nothing to do.
  void WaitForBackground();

  // Tokens, in whole blocks, that the pool could promise to `rows` new rows together, however they
  // share them (at most max_seq_len each); 0 when there are fewer rows.
  uint64_t FreeTokens(uint32_t rows = 1) const;
  // The same of an empty cache.
  uint64_t CapacityTokens(uint32_t rows = 1) const;
  const VirtualLayout& layout(uint32_t rank = 0) const { return ranks_[rank].rank.layout; }
  VirtualKvMetrics metrics() const;

 private:
  // A page here is one of each range.
  struct RankState {
    Rank rank;
    uint64_t pool = 0;      // pages
    uint64_t promised = 0;  // to live rows; <= pool
    uint64_t mapped = 0;    // <= pool
  };
  struct Row {
    bool live = false;
    uint32_t tokens = 0;           // written, or about to be; <= promised
    uint32_t promised = 0;         // tokens
    uint32_t expected = 0;         // tokens: nothing is mapped ahead beyond
    uint64_t turn = 0;             // moves when it is taken and when it is freed
    std::vector<uint64_t> mapped;  // pages, by rank: a row's first ones
  };
  struct Ahead {
    uint32_t row;
    uint64_t turn;
    uint32_t tokens;
  };
  using Lock = std::unique_lock<std::mutex>;

  explicit VirtualKvCache(std::vector<RankState> ranks);
  void Loop();
  Status Shortage(uint32_t rank, uint64_t pages) const;
  uint32_t BestRow(uint32_t tokens) const;
  Status CheckStep(std::span<const uint32_t> seq_lens) const;
  Status Promise(std::span<const uint32_t> seq_lens);
  void SetPromise(Row& row, uint32_t tokens);
  Status StepLocked(Lock& lock, std::span<const uint32_t> seq_lens);
  Status MapRow(Lock& lock, uint32_t row, uint32_t tokens, bool ahead);
  Status MapRun(uint32_t rank, uint32_t row, uint64_t count);
  uint64_t Reclaim(uint32_t rank, uint64_t count, bool from_live_rows);
  uint64_t TakeBack(uint32_t rank, uint32_t row, uint64_t keep, uint64_t count);
  void TakeBackStrays();
  uint64_t TokensIn(uint32_t rows, bool empty) const;

  mutable std::mutex mutex_;  // guards all below
  std::vector<RankState> ranks_;
  std::vector<Row> rows_;
  uint32_t free_rows_ = 0;
  uint64_t turns_ = 0;
  bool reserved_ = false;
  VirtualKvMetrics counts_;
  std::vector<Ahead> ahead_;
  bool busy_ = false;
  bool stop_ = false;
  std::condition_variable work_;
  std::condition_variable idle_;
  std::thread thread_;
};

}  // namespace kvrelay
