// The schedule kernel: one CTA that turns a step's lengths and prefixes into a plan (plan.h). It
// waits for memory twice: for lengths, and for the blocks that CTAs begin with.
#include "attention/cuda/launch.h"
#include "attention/cuda/plan_device.cuh"

namespace kvrelay::attention::cuda {
namespace {

constexpr uint32_t kThreads = 1024;
constexpr uint32_t kWarps = kThreads / 32;
constexpr uint16_t kAlone = 0xffff;

// What the cost model reckons with, measured on an H200.
struct Costs {
  // One multiprocessor, 128 rows x 128 tokens of head size 128, both products.
  static constexpr float unit_us = 1.75F;
  // One multiprocessor's suffix items, while others multiply.
  static constexpr float sm_bytes_per_us = 65e3F;
  // The memory's.
  static constexpr float all_bytes_per_us = 4.4e6F;
  // L2's: prefix pages read again by other requests.
  static constexpr float shared_bytes_per_us = 8e6F;
  // What a pass of its own costs: its parts are written and added.
  static constexpr float pass_us = 1.5F;
};

// How the line of prefix units is cut.
struct Cut {
  uint32_t pieces;
  uint32_t units;  // of each piece
};

__device__ Cut CutLine(const AttendShape& shape, uint32_t units, float prefix_bytes,
                       float suffix_bytes) {
  if (units == 0) return {0, 1};
  const float sms = static_cast<float>(shape.multiprocessors);
  const float prefix_us = static_cast<float>(units) * Costs::unit_us;
  const float step_us = fmaxf((prefix_us + suffix_bytes / Costs::sm_bytes_per_us) / sms,
                              (prefix_bytes + suffix_bytes) / Costs::all_bytes_per_us);
  // As many CTAs as keep up with the step; more while there are others enough to read the suffixes.
  const auto needed = static_cast<uint32_t>(ceilf(prefix_us / step_us));
  const uint32_t spare = shape.multiprocessors > 60 ? shape.multiprocessors - 60 : 1;
  const uint32_t wanted =
      suffix_bytes == 0 ? shape.multiprocessors : max(needed, min(spare, units / 2));
  const uint32_t ctas = max(1U, min(wanted, shape.multiprocessors));
  const uint32_t each = CeilDiv(units, ctas);
  return {CeilDiv(units, each), each};
}

// What the threads share of a step.
struct Sums {
  uint32_t relayed;
  uint32_t units;
  uint32_t relayed_tokens;
  uint32_t own_tokens;
  uint32_t longest;  // suffix, in tokens
  uint32_t several;  // 1: a request has parts to add up
  uint32_t warps[kWarps];
};

__device__ uint32_t WarpScan(uint32_t value) {
  const uint32_t lane = threadIdx.x % 32;
#pragma unroll
  for (uint32_t step = 1; step < 32; step *= 2) {
    const uint32_t below = __shfl_up_sync(~0U, value, step);
    if (lane >= step) value += below;
  }
  return value;
}
// Of a value's WarpScan.
__device__ uint32_t WarpTotal(uint32_t inclusive) { return __shfl_sync(~0U, inclusive, 31); }

// Sum of the values of the threads before this one; `total` that of all.
__device__ uint32_t ScanBefore(Sums& sums, uint32_t value, uint32_t& total) {
  const uint32_t lane = threadIdx.x % 32;
  const uint32_t warp = threadIdx.x / 32;
  const uint32_t inclusive = WarpScan(value);
  __syncthreads();  // the sums before have been read
  if (lane == 31) sums.warps[warp] = inclusive;
  __syncthreads();
  const uint32_t others = sums.warps[lane];
  total = __reduce_add_sync(~0U, others);
  return inclusive - value + __reduce_add_sync(~0U, lane < warp ? others : 0);
}

class Schedule {
 public:
  __device__ Schedule(const AttendShape& shape, uint32_t head_dim, const BlockTables& tables,
                      const Plan& plan, Sums& sums, uint32_t* memory)
      : shape_(shape),
        token_bytes_(4.0F * static_cast<float>(head_dim)),
        tables_(tables),
        plan_(plan),
        sums_(sums),
        relayed_(reinterpret_cast<RelayedPrefix*>(memory)),
        begins_(reinterpret_cast<SuffixItem*>(relayed_ + shape.max_prefixes)),
        prefix_tokens_(reinterpret_cast<uint32_t*>(begins_ + shape.multiprocessors)),
        members_(prefix_tokens_ + shape.max_prefixes),
        joined_(reinterpret_cast<uint16_t*>(members_ + shape.max_prefixes)) {}

  static size_t Bytes(const AttendShape& shape) {
    return shape.max_prefixes * (sizeof(RelayedPrefix) + 2 * sizeof(uint32_t)) +
           shape.multiprocessors * sizeof(SuffixItem) + shape.max_requests * sizeof(uint16_t);
  }

  __device__ void Run(const StepBatch& batch, RelayMode mode) {
    Load(batch);
    if (threadIdx.x / 32 == 0) ChoosePrefixes(mode);
    __syncthreads();
    SumSuffixes(batch.contexts);
    __syncthreads();
    const uint32_t chunk_tokens = ChunkTokens();
    const float head_bytes = static_cast<float>(shape_.heads) * token_bytes_;
    const Cut cut =
        CutLine(shape_, sums_.units, head_bytes * static_cast<float>(sums_.relayed_tokens),
                head_bytes * static_cast<float>(sums_.own_tokens));
    const uint32_t chunks = PlanRequests(batch.contexts, chunk_tokens, cut.pieces);
    __syncthreads();
    PlanBeginnings(cut, chunks * shape_.heads);
  }

 private:
  // Who could share which prefix, and how long these are. Nobody has begun anything.
  __device__ void Load(const StepBatch& batch) {
    for (uint32_t p = threadIdx.x; p < shape_.max_prefixes; p += kThreads) {
      prefix_tokens_[p] = batch.prefix_tokens[p];
      members_[p] = 0;
    }
    if (threadIdx.x == 0) sums_.own_tokens = sums_.longest = sums_.several = 0;
    for (uint32_t i = threadIdx.x; i < shape_.multiprocessors; i += kThreads) plan_.begun[i] = 0;
    for (uint32_t i = threadIdx.x; i < shape_.max_requests * shape_.heads; i += kThreads) {
      plan_.contributions[i] = 0;
    }
    const uint32_t r0 = threadIdx.x;
    uint32_t context = r0 < shape_.max_requests ? batch.contexts[r0] : 0;
    uint32_t prefix = PrefixOf(batch, r0);
    __syncthreads();
    for (uint32_t r = r0; r < CeilDiv(shape_.max_requests, 32) * 32; r += kThreads) {
      if (r != r0) {
        context = r < shape_.max_requests ? batch.contexts[r] : 0;
        prefix = PrefixOf(batch, r);
      }
      const bool joins = prefix < shape_.max_prefixes && prefix_tokens_[prefix] > 0 &&
                         context >= prefix_tokens_[prefix];
      const uint32_t mine = joins ? prefix : kAlone;
      const uint32_t same = __match_any_sync(~0U, mine);
      if (joins && (same & ((1U << r % 32) - 1)) == 0) atomicAdd(&members_[mine], __popc(same));
      if (r < shape_.max_requests) joined_[r] = static_cast<uint16_t>(mine);
    }
    __syncthreads();
  }
  __device__ uint32_t PrefixOf(const StepBatch& batch, uint32_t r) const {
    return batch.prefixes == nullptr || r >= shape_.max_requests ? kNoPrefix : batch.prefixes[r];
  }

  // One warp: which prefixes get a pass, and their places on the line. members_ becomes their index
  // among the relayed, or kNone.
  __device__ void ChoosePrefixes(RelayMode mode) {
    const uint32_t lane = threadIdx.x % 32;
    uint32_t relayed = 0;
    uint32_t units = 0;
    uint32_t segments = 0;
    uint32_t members = 0;
    uint32_t all_tokens = 0;
    for (uint32_t first = 0; first < shape_.max_prefixes; first += 32) {
      const uint32_t p = first + lane;
      uint32_t sharers = p < shape_.max_prefixes ? members_[p] : 0;
      const uint32_t tokens = sharers > 0 ? prefix_tokens_[p] : 0;
      const float again = static_cast<float>(shape_.heads) * token_bytes_ *
                          static_cast<float>(tokens) * (static_cast<float>(sharers) - 1);
      const bool gains = sharers > 1 && again / Costs::shared_bytes_per_us > Costs::pass_us;
      if (mode == RelayMode::kNever || (mode == RelayMode::kAuto && !gains)) sharers = 0;
      const bool relay = sharers > 0;
      const uint32_t kv_tiles = CeilDiv(tokens, kTileTokens);
      const uint32_t row_tiles = CeilDiv(sharers, shape_.requests_per_tile());
      const uint32_t mine = shape_.heads * row_tiles;  // segments
      const uint32_t unit = WarpScan(mine * kv_tiles);
      const uint32_t segment = WarpScan(mine);
      const uint32_t member = WarpScan(sharers);
      const uint32_t relays = __ballot_sync(~0U, relay);
      const uint32_t index = relayed + __popc(relays & ((1U << lane) - 1));
      if (relay) {
        const RelayedPrefix prefix = {units + unit - mine * kv_tiles,
                                      segments + segment - mine,
                                      kv_tiles,
                                      row_tiles,
                                      members + member - sharers,
                                      sharers,
                                      tokens,
                                      p};
        relayed_[index] = prefix;
        plan_.relayed[index] = prefix;
      }
      if (p < shape_.max_prefixes) members_[p] = relay ? index : kNone;
      relayed += __popc(relays);
      units += WarpTotal(unit);
      segments += WarpTotal(segment);
      members += WarpTotal(member);
      all_tokens += __reduce_add_sync(~0U, relay ? tokens : 0);
    }
    if (lane == 0) sums_.relayed = relayed, sums_.units = units, sums_.relayed_tokens = all_tokens;
  }

  // The pass that covers the prefix of request r, or null.
  __device__ const RelayedPrefix* PassOf(uint32_t r) const {
    const uint32_t prefix = joined_[r];
    const uint32_t index = prefix == kAlone ? kNone : members_[prefix];
    return index == kNone ? nullptr : &relayed_[index];
  }

  // Each request's suffix: what no pass covers.
  __device__ void SumSuffixes(const uint32_t* contexts) {
    uint32_t tokens = 0;
    uint32_t longest = 0;
    for (uint32_t r = threadIdx.x; r < shape_.max_requests; r += kThreads) {
      const RelayedPrefix* pass = PassOf(r);
      const uint32_t own = contexts[r] - (pass == nullptr ? 0 : pass->tokens);
      tokens += own;
      longest = max(longest, own);
    }
    tokens = __reduce_add_sync(~0U, tokens);
    longest = __reduce_max_sync(~0U, longest);
    if (threadIdx.x % 32 == 0 && longest > 0) {
      atomicAdd(&sums_.own_tokens, tokens);
      atomicMax(&sums_.longest, longest);
    }
  }

  // Four items a multiprocessor, but no request in more than kMaxChunks parts: adding them up takes
  // longer than shorter items gain.
  __device__ uint32_t ChunkTokens() const {
    constexpr uint32_t kMaxChunks = 16;
    const uint64_t per_item =
        uint64_t{sums_.own_tokens} * shape_.heads / (4 * shape_.multiprocessors);
    const uint32_t tokens =
        max(static_cast<uint32_t>(per_item), CeilDiv(sums_.longest, kMaxChunks));
    return max(1U, CeilDiv(tokens, kTileTokens)) * kTileTokens;
  }

  // Requests before r that share its prefix. All lanes of a warp, r of its neighbours.
  __device__ uint32_t MemberOf(uint32_t r) const {
    const uint32_t lane = r % 32;
    const uint32_t prefix = r < shape_.max_requests ? joined_[r] : kAlone;
    const uint32_t same = __match_any_sync(~0U, prefix);
    uint32_t before = __popc(same & ((1U << lane) - 1));
    uint32_t leaders = __ballot_sync(~0U, prefix != kAlone && before == 0);
    while (leaders != 0) {
      const int leader = __ffs(static_cast<int>(leaders)) - 1;
      leaders &= leaders - 1;
      const uint32_t theirs = __shfl_sync(~0U, prefix, leader);
      uint32_t count = 0;
      for (uint32_t other = lane; other < r - lane; other += 32) count += joined_[other] == theirs;
      count = __reduce_add_sync(~0U, count);
      if (prefix == theirs) before += count;
    }
    return before;
  }

  // Every request's parts and chunks. Returns the count of chunks.
  __device__ uint32_t PlanRequests(const uint32_t* contexts, uint32_t chunk_tokens,
                                   uint32_t pieces) {
    uint32_t all_chunks = 0;
    for (uint32_t first = 0; first < shape_.max_requests; first += kThreads) {
      const uint32_t r = first + threadIdx.x;
      const uint32_t member = sums_.relayed > 0 ? MemberOf(r) : 0;
      RequestPlan mine = {};
      uint32_t begin = 0;
      uint32_t end = 0;
      if (r < shape_.max_requests) {
        end = contexts[r];
        if (const RelayedPrefix* pass = PassOf(r); pass != nullptr) {
          begin = pass->tokens;
          plan_.members[pass->first_member + member] = r;
          const uint32_t tile = member / shape_.requests_per_tile();
          mine.kv_tiles = pass->kv_tiles;
          mine.segment = pass->first_segment + tile;
          mine.segment_step = pass->row_tiles;
          mine.unit = pass->first_unit + tile * pass->kv_tiles;
          mine.tile_row = member % shape_.requests_per_tile() * shape_.group;
        }
        mine.suffix_chunks = CeilDiv(end - begin, chunk_tokens);
        // A row without any key still gets its zeros.
        if (mine.kv_tiles == 0) mine.suffix_chunks = max(mine.suffix_chunks, 1U);
      }
      uint32_t total;
      const uint32_t chunk = all_chunks + ScanBefore(sums_, mine.suffix_chunks, total);
      all_chunks += total;
      if (r >= shape_.max_requests) continue;
      mine.first_part = chunk * shape_.heads;
      plan_.requests[r] = mine;
      const bool alone = mine.kv_tiles == 0 && mine.suffix_chunks == 1;
      if (!alone) sums_.several = 1;
      SuffixItem item = {.part = mine.first_part, .request = r, .alone = alone};
      item.prefix = joined_[r];
      item.prefix_tokens = item.prefix == kAlone ? 0 : prefix_tokens_[item.prefix];
      for (uint32_t i = 0; i < mine.suffix_chunks; ++i) {
        item.begin = begin + i * chunk_tokens;
        item.end = min(end, item.begin + chunk_tokens);
        plan_.chunks[chunk + i] = item;
        for (uint32_t head = 0; head < shape_.heads; ++head) {
          const uint32_t cta = pieces + item.part + head;
          if (cta >= shape_.multiprocessors) break;
          begins_[cta] = item;
          begins_[cta].head = head;
          begins_[cta].part += head;
        }
        item.part += shape_.heads;
      }
    }
    return all_chunks;
  }

  // The header, and what each CTA begins with.
  __device__ void PlanBeginnings(const Cut& cut, uint32_t items) {
    if (threadIdx.x == 0) {
      *plan_.header = {.pieces = cut.pieces,
                       .piece_units = cut.units,
                       .units = sums_.units,
                       .relayed = sums_.relayed,
                       .suffix_items = items,
                       .merges = sums_.several != 0 ? shape_.max_requests * shape_.heads : 0};
    }
    // Several CTAs' blocks are under way at a time.
    constexpr uint32_t kAtOnce = 5;
    for (uint32_t of = threadIdx.x / 32; of < shape_.multiprocessors; of += kAtOnce * kWarps) {
      uint32_t blocks[kAtOnce];
#pragma unroll
      for (uint32_t i = 0; i < kAtOnce; ++i) {
        const uint32_t cta = of + i * kWarps;
        blocks[i] = cta < shape_.multiprocessors ? PlanBeginning(cta, cut, items) : 0;
      }
#pragma unroll
      for (uint32_t i = 0; i < kAtOnce; ++i) {
        const uint32_t cta = of + i * kWarps;
        if (cta < shape_.multiprocessors) plan_.first[cta].blocks[threadIdx.x % 32] = blocks[i];
      }
    }
  }

  // One warp: all but the blocks. Returns the block that this lane has to write.
  __device__ uint32_t PlanBeginning(uint32_t cta, const Cut& cut, uint32_t items) {
    const uint32_t lane = threadIdx.x % 32;
    FirstWork& first = plan_.first[cta];
    WorkKind kind = WorkKind::kStop;
    SuffixItem item = {};
    if (cta < cut.pieces) {
      kind = WorkKind::kPrefix;
      const uint32_t unit = cta * cut.units;
      const PrefixItem piece =
          ItemAt(shape_, RelayedAt(unit), cta, unit, min(sums_.units, unit + cut.units));
      if (lane == 0) first.prefix = piece;
      item.begin = piece.begin, item.end = piece.end;
      item.prefix = piece.prefix, item.prefix_tokens = piece.prefix_tokens;
    } else if (cta - cut.pieces < items) {
      kind = WorkKind::kSuffix;
      item = begins_[cta];
      if (lane == 0) first.suffix = item;
    }
    if (lane == 0) first.kind = kind;
    const uint32_t token = item.begin + lane * kUnitTokens;
    if (token >= item.end) return 0;
    return BlockAt(tables_, item.request, item.prefix, item.prefix_tokens / shape_.block_size,
                   token / shape_.block_size);
  }

  __device__ const RelayedPrefix& RelayedAt(uint32_t unit) const {
    const uint32_t lane = threadIdx.x % 32;
    uint32_t found = 0;
    for (uint32_t first = 0; first < sums_.relayed; first += 32) {
      found += __popc(__ballot_sync(
          ~0U, first + lane < sums_.relayed && relayed_[first + lane].first_unit <= unit));
    }
    return relayed_[found - 1];
  }

  const AttendShape& shape_;
  const float token_bytes_;  // of one head, K and V
  const BlockTables& tables_;
  const Plan& plan_;
  Sums& sums_;
  RelayedPrefix* relayed_;   // as the plan's
  SuffixItem* begins_;       // [multiprocessors] for CTAs that begin with one
  uint32_t* prefix_tokens_;  // [max_prefixes]
  uint32_t* members_;        // [max_prefixes] how many
  uint16_t* joined_;         // [max_requests] the prefix that a request could share, or kAlone
};

__global__ void __launch_bounds__(kThreads, 1)
    ScheduleKernel(const AttendShape shape, const uint32_t head_dim, const StepBatch batch,
                   const RelayMode mode, const BlockTables tables, const Plan plan) {
  extern __shared__ __align__(16) uint32_t memory[];
  __shared__ Sums sums;
  Schedule(shape, head_dim, tables, plan, sums, memory).Run(batch, mode);
}

}  // namespace

cudaError_t LaunchSchedule(const AttendShape& shape, uint32_t head_dim, const StepBatch& batch,
                           RelayMode mode, const Plan& plan, cudaStream_t stream) {
  const size_t bytes = Schedule::Bytes(shape);
  if (bytes > 48 * 1024) {
    const cudaError_t error = cudaFuncSetAttribute(
        ScheduleKernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(bytes));
    if (error != cudaSuccess) return error;
  }
  const BlockTables tables = {batch.blocks, batch.prefix_blocks, batch.blocks_stride,
                              batch.prefix_blocks_stride};
  ScheduleKernel<<<1, kThreads, bytes, stream>>>(shape, head_dim, batch, mode, tables, plan);
  return cudaGetLastError();
}

}  // namespace kvrelay::attention::cuda
