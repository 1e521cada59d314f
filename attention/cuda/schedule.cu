// The schedule kernel: one CTA that turns a step's lengths and prefixes into a plan (plan.h).
#include "attention/cuda/launch.h"

namespace kvrelay::attention::cuda {
namespace {

constexpr uint32_t kThreads = 1024;

// What the cost model reckons with, measured on an H200.
struct Costs {
  float unit_us = 2.0F;              // one SM: 128 rows x 128 tokens x head size 128, both products
  float sm_bytes_per_us = 60e3F;     // one SM's suffix items, while others multiply
  float all_bytes_per_us = 4.4e6F;   // the memory's
  float shared_bytes_per_us = 8e6F;  // prefix pages read again by other requests: L2's
  float pass_us = 1.5F;  // what a pass of its own costs: its parts are written and added
};

struct Sums {
  uint32_t warps[32];
  uint32_t total;
};

// Sum of the values of the threads before this one; `total` that of all.
__device__ uint32_t ScanBefore(Sums& sums, uint32_t value, uint32_t& total) {
  const uint32_t lane = threadIdx.x % 32;
  const uint32_t warp = threadIdx.x / 32;
  uint32_t inclusive = value;
#pragma unroll
  for (uint32_t step = 1; step < 32; step *= 2) {
    const uint32_t below = __shfl_up_sync(~0U, inclusive, step);
    if (lane >= step) inclusive += below;
  }
  __syncthreads();
  if (lane == 31) sums.warps[warp] = inclusive;
  __syncthreads();
  if (warp == 0) {
    uint32_t mine = sums.warps[lane];
#pragma unroll
    for (uint32_t step = 1; step < 32; step *= 2) {
      const uint32_t below = __shfl_up_sync(~0U, mine, step);
      if (lane >= step) mine += below;
    }
    sums.warps[lane] = mine;
  }
  __syncthreads();
  total = sums.warps[31];
  return inclusive - value + (warp > 0 ? sums.warps[warp - 1] : 0);
}

__device__ uint32_t DivideUp(uint32_t a, uint32_t b) { return (a + b - 1) / b; }

// How the line of prefix units is cut.
struct Cut {
  uint32_t pieces;
  uint32_t units;  // of each piece
};

__device__ Cut CutLine(const AttendShape& shape, const Costs& costs, uint32_t units,
                       float prefix_bytes, float suffix_bytes) {
  if (units == 0) return {0, 1};
  const float sms = static_cast<float>(shape.multiprocessors);
  const float prefix_us = static_cast<float>(units) * costs.unit_us;
  const float step_us = fmaxf((prefix_us + suffix_bytes / costs.sm_bytes_per_us) / sms,
                              (prefix_bytes + suffix_bytes) / costs.all_bytes_per_us);
  // As many CTAs as keep up with the step; more while there are others enough to read the suffixes.
  const auto needed = static_cast<uint32_t>(ceilf(prefix_us / step_us));
  const uint32_t spare = shape.multiprocessors > 60 ? shape.multiprocessors - 60 : 1;
  const uint32_t wanted =
      suffix_bytes == 0 ? shape.multiprocessors : max(needed, min(spare, units / 2));
  const uint32_t ctas = max(1U, min(wanted, shape.multiprocessors));
  const uint32_t each = DivideUp(units, ctas);
  return {DivideUp(units, each), each};
}

__global__ void __launch_bounds__(kThreads, 1)
    ScheduleKernel(const AttendShape shape, const uint32_t head_dim, const StepBatch batch,
                   const RelayMode mode, const Plan plan, const uint32_t max_items) {
  extern __shared__ uint32_t memory[];
  uint32_t* member_count = memory;  // [max_prefixes], then relayed index
  uint16_t* joined = reinterpret_cast<uint16_t*>(member_count + shape.max_prefixes);
  __shared__ Sums sums;
  __shared__ uint32_t chunk_tokens;
  __shared__ uint32_t longest;  // suffix, in tokens
  __shared__ Cut cut;
  __shared__ float byte_sums[2];
  constexpr uint16_t kAlone = 0xffff;
  const Costs costs;
  const uint32_t thread = threadIdx.x;
  const uint32_t requests = shape.max_requests;
  const uint32_t prefixes = shape.max_prefixes;
  const float token_bytes = 4.0F * static_cast<float>(head_dim);  // of one head, K and V

  // Who could share which prefix.
  for (uint32_t p = thread; p < prefixes; p += kThreads) member_count[p] = 0;
  if (thread < 2) byte_sums[thread] = 0;
  if (thread == 0) longest = 0;
  __syncthreads();
  for (uint32_t r = thread; r < requests; r += kThreads) {
    const uint32_t prefix = batch.prefixes == nullptr ? kNoPrefix : batch.prefixes[r];
    uint16_t mine = kAlone;
    if (prefix < prefixes) {
      const uint32_t tokens = batch.prefix_tokens[prefix];
      if (tokens > 0 && batch.contexts[r] >= tokens) {
        mine = static_cast<uint16_t>(prefix);
        atomicAdd(&member_count[prefix], 1);
      }
    }
    joined[r] = mine;
  }
  __syncthreads();

  // Which prefixes get a pass, and their places on the line.
  uint32_t relayed_total = 0;
  uint32_t units_total = 0;
  uint32_t segments_total = 0;
  uint32_t members_total = 0;
  for (uint32_t first = 0; first < prefixes; first += kThreads) {
    const uint32_t p = first + thread;
    uint32_t members = 0;
    uint32_t tokens = 0;
    if (p < prefixes) {
      members = member_count[p];
      tokens = members > 0 ? batch.prefix_tokens[p] : 0;
      const float again = static_cast<float>(shape.heads) * token_bytes *
                          static_cast<float>(tokens) * (static_cast<float>(members) - 1);
      const bool gains = members > 1 && again / costs.shared_bytes_per_us > costs.pass_us;
      if (mode == RelayMode::kNever || (mode == RelayMode::kAuto && !gains)) members = 0;
    }
    const bool relay = members > 0;
    const uint32_t kv_tiles = DivideUp(tokens, kTileTokens);
    const uint32_t row_tiles = DivideUp(members, shape.requests_per_tile());
    const uint32_t segments = relay ? shape.heads * row_tiles : 0;
    uint32_t total;
    const uint32_t index = relayed_total + ScanBefore(sums, relay ? 1 : 0, total);
    relayed_total += total;
    const uint32_t unit = units_total + ScanBefore(sums, segments * kv_tiles, total);
    units_total += total;
    const uint32_t segment = segments_total + ScanBefore(sums, segments, total);
    segments_total += total;
    const uint32_t member = members_total + ScanBefore(sums, members, total);
    members_total += total;
    if (p < prefixes) member_count[p] = relay ? index : kNone;
    if (relay) {
      plan.relayed[index] = {unit, segment, kv_tiles, row_tiles, member, members, tokens, p};
      atomicAdd(&byte_sums[0], static_cast<float>(shape.heads) * token_bytes * tokens);
    }
  }
  __syncthreads();  // relayed indices are in member_count now, and in the plan

  // Each request's suffix: what no pass covers.
  uint32_t tokens_before = 0;
  for (uint32_t first = 0; first < requests; first += kThreads) {
    const uint32_t r = first + thread;
    uint32_t own = 0;
    if (r < requests) {
      const uint32_t relayed = joined[r] == kAlone ? kNone : member_count[joined[r]];
      own = batch.contexts[r] - (relayed == kNone ? 0 : batch.prefix_tokens[joined[r]]);
    }
    uint32_t total;
    ScanBefore(sums, own, total);
    tokens_before += total;
    atomicMax(&longest, __reduce_max_sync(~0U, own));
  }
  __syncthreads();
  if (thread == 0) {
    // Four items a multiprocessor, but no request in more than kMaxChunks parts: adding them up
    // takes longer than shorter items gain.
    constexpr uint32_t kMaxChunks = 16;
    const uint64_t all = uint64_t{tokens_before} * shape.heads;
    const uint64_t per_item = all / (4 * shape.multiprocessors);
    const uint32_t tokens = max(static_cast<uint32_t>(per_item), DivideUp(longest, kMaxChunks));
    chunk_tokens = max(1U, DivideUp(tokens, kTileTokens)) * kTileTokens;
    byte_sums[1] = static_cast<float>(all) * token_bytes;
    cut = CutLine(shape, costs, units_total, byte_sums[0], byte_sums[1]);
  }
  __syncthreads();

  uint32_t chunks_before = 0;
  for (uint32_t first = 0; first < requests; first += kThreads) {
    const uint32_t r = first + thread;
    uint32_t chunks = 0;
    RequestPlan mine = {};
    uint32_t member = 0;
    uint32_t begin = 0;
    uint32_t end = 0;
    if (r < requests) {
      end = batch.contexts[r];
      if (joined[r] != kAlone && member_count[joined[r]] != kNone) {
        begin = batch.prefix_tokens[joined[r]];
        // Its place among the members: requests before it that share the prefix.
        for (uint32_t other = 0; other < r; ++other) member += joined[other] == joined[r];
        const RelayedPrefix relayed = plan.relayed[member_count[joined[r]]];
        plan.members[relayed.first_member + member] = r;
        const uint32_t tile = member / shape.requests_per_tile();
        mine.kv_tiles = relayed.kv_tiles;
        mine.segment = relayed.first_segment + tile;
        mine.segment_step = relayed.row_tiles;
        mine.unit = relayed.first_unit + tile * relayed.kv_tiles;
        mine.tile_row = member % shape.requests_per_tile() * shape.group;
      }
      chunks = DivideUp(end - begin, chunk_tokens);
      // A row without any key still gets its zeros.
      if (mine.kv_tiles == 0) chunks = max(chunks, 1U);
      mine.suffix_chunks = chunks;
    }
    uint32_t total;
    const uint32_t before = chunks_before + ScanBefore(sums, chunks, total);
    chunks_before += total;
    if (r < requests) {
      mine.first_part = before * shape.heads;
      plan.requests[r] = mine;
    }
  }
  __syncthreads();

  // The items of each request and head.
  int several = 0;
  for (uint32_t i = thread; i < requests * shape.heads; i += kThreads) {
    const uint32_t r = i / shape.heads;
    const uint32_t head = i % shape.heads;
    const RequestPlan mine = plan.requests[r];
    const uint32_t prefix = joined[r];
    const uint32_t prefix_tokens = prefix == kAlone ? 0 : batch.prefix_tokens[prefix];
    uint32_t contributions = mine.suffix_chunks;
    if (mine.kv_tiles != 0) {
      const uint32_t unit = mine.unit + head * mine.segment_step * mine.kv_tiles;
      contributions += (unit + mine.kv_tiles - 1) / cut.units - unit / cut.units + 1;
    }
    if (contributions > 1 || mine.kv_tiles != 0) several = 1;
    const uint32_t end = batch.contexts[r];
    for (uint32_t chunk = 0; chunk < mine.suffix_chunks; ++chunk) {
      const uint32_t part = mine.first_part + chunk * shape.heads + head;
      const uint32_t begin = (mine.kv_tiles == 0 ? 0 : prefix_tokens) + chunk * chunk_tokens;
      plan.suffix[part] = {r,    head,          begin,         min(end, begin + chunk_tokens),
                           part, contributions, prefix_tokens, prefix};
    }
    plan.contributions[i] = 0;
  }
  several = __syncthreads_or(several);
  if (thread == 0) {
    *plan.header = {.pieces = cut.pieces,
                    .piece_units = cut.units,
                    .units = units_total,
                    .relayed = relayed_total,
                    .suffix_items = min(max_items, chunks_before * shape.heads),
                    .chunk_tokens = chunk_tokens,
                    .merges = several != 0 ? requests * shape.heads : 0};
  }
}

}  // namespace

cudaError_t LaunchSchedule(const AttendShape& shape, uint32_t head_dim, const StepBatch& batch,
                           RelayMode mode, const Plan& plan, cudaStream_t stream) {
  const size_t bytes =
      shape.max_prefixes * sizeof(uint32_t) + shape.max_requests * sizeof(uint16_t);
  ScheduleKernel<<<1, kThreads, bytes, stream>>>(shape, head_dim, batch, mode, plan,
                                                 PlanLimits(shape).suffix_items);
  return cudaGetLastError();
}

}  // namespace kvrelay::attention::cuda
