#include "attention/cuda/paged_args.h"

namespace kvrelay::attention::cuda {
namespace {

constexpr uint32_t kThreads = 1024;
constexpr uint32_t kLeastChunk = 128;  // keys
constexpr uint32_t kChunkStep = 64;

struct Count {
  uint64_t a = 0;
  uint64_t b = 0;
  __device__ Count operator+(const Count& other) const { return {a + other.a, b + other.b}; }
};

__device__ Count FromLaneBelow(const Count& count, uint32_t distance) {
  return {__shfl_up_sync(~0U, count.a, distance), __shfl_up_sync(~0U, count.b, distance)};
}

// The sum over the threads before this one, and of all in `total`.
__device__ Count SumBefore(const Count& mine, Count* total) {
  __shared__ Count warps[32];
  const uint32_t lane = threadIdx.x % 32;
  const uint32_t warp = threadIdx.x / 32;
  Count sum = mine;
  for (uint32_t distance = 1; distance < 32; distance *= 2) {
    const Count below = FromLaneBelow(sum, distance);
    if (lane >= distance) sum = sum + below;
  }
  __syncthreads();
  if (lane == 31) warps[warp] = sum;
  __syncthreads();
  Count before;
  *total = {};
  for (uint32_t w = 0; w < kThreads / 32; ++w) {
    if (w < warp) before = before + warps[w];
    *total = *total + warps[w];
  }
  return {before.a + sum.a - mine.a, before.b + sum.b - mine.b};
}

struct Rows {
  uint32_t first;
  uint32_t count;
};

__device__ Rows RowsOf(const PagedBatch& batch, uint32_t sequence) {
  if (batch.first_rows == nullptr) return {sequence, 1};
  const uint32_t first = batch.first_rows[sequence];
  return {first, batch.first_rows[sequence + 1] - first};
}

__device__ bool Wide(const PagedSizes& sizes, uint32_t packed) {
  return packed > sizes.tile.narrow;
}

__device__ uint32_t TilesOf(const PagedSizes& sizes, uint32_t packed) {
  return Wide(sizes, packed) ? PiecesOf(packed, sizes.tile.wide) : (packed != 0 ? 1 : 0);
}

// The sequence that has the tile: the last whose tiles begin at or before it.
__device__ uint32_t SequenceOf(const PagedPlan& plan, uint32_t sequences, uint32_t tile) {
  uint32_t low = 0;
  uint32_t high = sequences;
  while (high - low > 1) {
    const uint32_t middle = (low + high) / 2;
    (plan.first_tiles[middle] <= tile ? low : high) = middle;
  }
  return low;
}

__device__ PagedTile MakeTile(const PagedSizes& sizes, const PagedBatch& batch,
                              const PagedPlan& plan, uint32_t index) {
  PagedTile tile = {};
  tile.sequence = SequenceOf(plan, sizes.max_sequences, index);
  const StepBatch& requests = batch.requests;
  const Rows rows = RowsOf(batch, tile.sequence);
  const uint32_t packed = rows.count * sizes.group;
  const uint32_t context = requests.contexts[tile.sequence];
  tile.first_row = rows.first;
  tile.position = static_cast<int32_t>(context - rows.count);
  tile.packed = (index - plan.first_tiles[tile.sequence]) * sizes.tile.wide;
  tile.rows = Wide(sizes, packed) ? min(sizes.tile.wide, packed - tile.packed) : packed;
  const int32_t first = tile.position + static_cast<int32_t>(tile.packed / sizes.group);
  const int32_t last =
      tile.position + static_cast<int32_t>((tile.packed + tile.rows - 1) / sizes.group);
  const int32_t hidden = first + 1 - static_cast<int32_t>(sizes.window);
  tile.end = static_cast<uint32_t>(max(last + 1, 0));
  tile.begin = sizes.window == 0 ? 0 : min(static_cast<uint32_t>(max(hidden, 0)), tile.end);
  if (requests.prefixes != nullptr && requests.prefixes[tile.sequence] != kNoPrefix) {
    tile.prefix = requests.prefixes[tile.sequence];
    const uint32_t tokens = requests.prefix_tokens[tile.prefix];
    tile.shared = tokens <= context ? tokens : 0;
  }
  return tile;
}

// Chunks' lengths in keys, in narrow and in wide tiles, which take about twice as long for a key.
struct Chunks {
  uint32_t narrow;
  uint32_t wide;
  __device__ uint32_t For(const PagedSizes& sizes, const PagedTile& tile) const {
    return Wide(sizes, tile.rows) ? wide : narrow;
  }
};

__device__ uint32_t LeastChunk(uint64_t keys, uint32_t heads, uint32_t aimed) {
  const uint64_t chunk = (keys * heads + aimed - 1) / aimed;
  return static_cast<uint32_t>(max(chunk, uint64_t{kLeastChunk}));
}

// Chunks about as long as `chunk`, but so long that there are not more than the limits.
__device__ Chunks ChunksNear(const PagedSizes& sizes, const Count& keys, uint32_t chunk) {
  const PagedLimits limits(sizes);
  Chunks chunks;
  chunks.narrow = max(chunk, LeastChunk(keys.a + 2 * keys.b, sizes.kv_heads, limits.items_aimed));
  chunks.wide = max(chunks.narrow / 2, LeastChunk(keys.b, sizes.kv_heads, limits.wide_aimed));
  return chunks;
}

// How long CTAs that take chunks in turn need for all, in the time of a key. Each warp predicts for
// other lengths; the best of them.
__device__ Chunks ChooseChunks(const PagedSizes& sizes, const PagedPlan& plan, uint32_t tiles,
                               const Count& keys) {
  constexpr uint64_t kItemTime = 96;  // of a chunk's beginning and end
  constexpr uint32_t kWarps = kThreads / 32;
  __shared__ uint64_t times[kWarps];
  const uint32_t warp = threadIdx.x / 32;
  // kLeastChunk, and 2^(1/3) times as much in each step.
  const auto chunk_of = [](uint32_t step) {
    const uint32_t third = step % 3 == 0 ? 100 : step % 3 == 1 ? 126 : 159;
    return (kLeastChunk << step / 3) * third / 100;
  };
  const Chunks mine = ChunksNear(sizes, keys, chunk_of(warp));
  uint64_t items = 0;
  uint64_t longest = 0;
  for (uint32_t index = threadIdx.x % 32; index < tiles; index += 32) {
    const PagedTile& tile = plan.tiles[index];
    const uint32_t tile_keys = tile.end - tile.begin;
    const uint32_t chunk = mine.For(sizes, tile);
    items += max(1U, PiecesOf(tile_keys, chunk));
    const uint64_t time = uint64_t{min(chunk, tile_keys)} * (Wide(sizes, tile.rows) ? 2 : 1);
    longest = max(longest, time);
  }
  for (uint32_t distance = 16; distance > 0; distance /= 2) {
    items += __shfl_xor_sync(~0U, items, distance);
    longest = max(longest, __shfl_xor_sync(~0U, longest, distance));
  }
  items *= sizes.kv_heads;
  if (threadIdx.x % 32 == 0 && items > 0) {
    const uint64_t rounds = (items + sizes.ctas - 1) / sizes.ctas;
    const uint64_t mean = (keys.a + 2 * keys.b) * sizes.kv_heads / items;
    times[warp] = max(rounds * mean, longest) + rounds * kItemTime;
  }
  __syncthreads();
  uint32_t best = 0;
  for (uint32_t w = 1; w < kWarps; ++w) {
    if (items > 0 && times[w] < times[best]) best = w;
  }
  return ChunksNear(sizes, keys, chunk_of(best));
}

__global__ void __launch_bounds__(kThreads)
    SchedulePaged(const PagedSizes sizes, const PagedBatch batch, const PagedPlan plan) {
  Count done;
  Count total;
  for (uint32_t from = 0; from < sizes.max_sequences; from += kThreads) {
    const uint32_t sequence = from + threadIdx.x;
    const bool is = sequence < sizes.max_sequences;
    const uint64_t tiles = is ? TilesOf(sizes, RowsOf(batch, sequence).count * sizes.group) : 0;
    const Count before = SumBefore({tiles, 0}, &total);
    if (is) plan.first_tiles[sequence] = static_cast<uint32_t>(done.a + before.a);
    done = done + total;
  }
  const auto tiles = static_cast<uint32_t>(done.a);
  __syncthreads();

  // Keys of narrow and of wide tiles.
  Count mine;
  for (uint32_t index = threadIdx.x; index < tiles; index += kThreads) {
    const PagedTile tile = MakeTile(sizes, batch, plan, index);
    plan.tiles[index] = tile;
    (Wide(sizes, tile.rows) ? mine.b : mine.a) += tile.end - tile.begin;
  }
  Count keys;
  SumBefore(mine, &keys);
  const Chunks chunks = ChooseChunks(sizes, plan, tiles, keys);

  // The last tiles of a sequence see most keys: they come first.
  done = {};
  for (uint32_t from = 0; from < tiles; from += kThreads) {
    const bool is = from + threadIdx.x < tiles;
    const uint32_t index = is ? tiles - 1 - (from + threadIdx.x) : 0;
    PagedTile tile = {};
    uint32_t parts = 0;
    if (is) {
      tile = plan.tiles[index];
      const uint32_t tile_keys = tile.end - tile.begin;
      parts = max(1U, PiecesOf(tile_keys, chunks.For(sizes, tile)));
      tile.chunk = PiecesOf(max(1U, PiecesOf(tile_keys, parts)), kChunkStep) * kChunkStep;
      parts = max(1U, PiecesOf(tile_keys, tile.chunk));
      tile.parts = parts;
    }
    const uint64_t part_rows = parts > 1 ? uint64_t{parts} * sizes.kv_heads * tile.rows : 0;
    const Count before = done + SumBefore({parts, part_rows}, &total);
    if (is) {
      tile.first_part = static_cast<uint32_t>(before.b);
      plan.tiles[index] = tile;
      for (uint32_t c = 0; c < parts; ++c) plan.items[before.a + c] = {index, c};
      for (uint32_t h = 0; h < sizes.kv_heads; ++h) {
        plan.contributions[index * sizes.kv_heads + h] = 0;
      }
    }
    done = done + total;
  }
  if (threadIdx.x == 0) *plan.header = {static_cast<uint32_t>(done.a), 0, 0};
}

}  // namespace

cudaError_t LaunchPagedSchedule(const PagedSizes& sizes, const PagedBatch& batch,
                                const PagedPlan& plan, cudaStream_t stream) {
  SchedulePaged<<<1, kThreads, 0, stream>>>(sizes, batch, plan);
  return cudaGetLastError();
}

}  // namespace kvrelay::attention::cuda
