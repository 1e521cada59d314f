#include "attention/attend_rows.h"

#include <algorithm>
#include <cstring>
#include <optional>

#include "attention/scratch.h"
#include "attention/softmax_state.h"
#include "attention/tile_kernel.h"
#include "attention/value_row.h"
#include "base/parallel.h"

namespace kvrelay::attention {
namespace {

// Partial results of items whose chunks several threads share; an item that does not fit stays with
// one thread.
constexpr size_t kMaxPartialFloats = size_t{16} << 20;

// What all items of one call have in common.
struct Operation {
  const KvView& kv;
  uint32_t layer;
  uint32_t query_heads;
  uint32_t kv_heads;
  uint32_t group;  // query heads per KV head
  uint32_t dim;
  uint32_t padded_dim;
  float scale;
  AttentionKind kind;
  const float* q;
  AttendTileFn attend_tile;

  uint32_t PackedRows(const RowItem& item) const {
    uint32_t rows = 0;
    for (const RowSegment& segment : item.segments) rows += segment.rows;
    return rows * group;
  }
  // Index of the first query head of a KV head's group in a row of Q, O or LSE.
  size_t FirstHead(uint32_t row, uint32_t kv_head) const {
    return size_t{row} * query_heads + size_t{kv_head} * group;
  }
};

uint32_t FirstChunk(const KeyRun& run) { return run.first_key / kChunkKeys; }
uint32_t Chunks(const KeyRun& run) {
  return (run.keys + kChunkKeys - 1) / kChunkKeys - FirstChunk(run);
}

// A KV head's rows of Q, packed, and what they see. Lies in memory of the caller.
struct PackedRows {
  float* q;
  uint32_t* end;
  uint32_t* begin;  // null without a window
  float* slope;     // null without ALiBi, as `position`
  int32_t* position;

  static size_t Floats(const Operation& op, uint32_t rows) {
    return Scratch::Padded(size_t{rows} * op.dim) + 4 * Scratch::Padded(rows);
  }
  static PackedRows In(float* memory, const Operation& op, uint32_t rows) {
    static_assert(sizeof(uint32_t) == sizeof(float));
    float* row_memory = memory + Scratch::Padded(size_t{rows} * op.dim);
    const auto column = [&](size_t i) { return row_memory + i * Scratch::Padded(rows); };
    const bool window = op.kind.window > 0;
    const bool alibi = !op.kind.alibi_slopes.empty();
    return {.q = memory,
            .end = reinterpret_cast<uint32_t*>(column(0)),
            .begin = window ? reinterpret_cast<uint32_t*>(column(1)) : nullptr,
            .slope = alibi ? column(2) : nullptr,
            .position = alibi ? reinterpret_cast<int32_t*>(column(3)) : nullptr};
  }
};

// Fills `packed`; returns the end of the keys that any row sees.
uint32_t PackRows(const Operation& op, const RowItem& item, uint32_t kv_head,
                  const PackedRows& packed) {
  uint32_t row = 0;
  uint32_t most = 0;
  for (const RowSegment& segment : item.segments) {
    for (uint32_t i = 0; i < segment.rows; ++i, row += op.group) {
      std::memcpy(packed.q + size_t{row} * op.dim,
                  op.q + op.FirstHead(segment.first_row + i, kv_head) * op.dim,
                  size_t{op.group} * op.dim * sizeof(float));
      const auto clamp = [&](int64_t key) {
        return static_cast<uint32_t>(std::clamp<int64_t>(key, 0, item.run.keys));
      };
      const int64_t end = segment.first_visible + i;
      std::fill_n(packed.end + row, op.group, clamp(end));
      most = std::max(most, clamp(end));
      if (packed.begin != nullptr) {
        std::fill_n(packed.begin + row, op.group, clamp(end - op.kind.window));
      }
      if (packed.slope != nullptr) {
        std::copy_n(op.kind.alibi_slopes.begin() + size_t{kv_head} * op.group, op.group,
                    packed.slope + row);
        std::fill_n(packed.position + row, op.group, static_cast<int32_t>(end - 1));
      }
    }
  }
  return most;
}

void GatherTile(const Operation& op, const KeyRun& run, uint32_t kv_head, uint32_t first,
                uint32_t end, KeyTile& tile) {
  const KvLayout& layout = op.kv.layout();
  tile.first = first;
  tile.count = std::min(kTileKeys, end - first);
  tile.dtype = layout.dtype;
  uint32_t index = first / layout.block_size;
  uint32_t slot = first % layout.block_size;
  for (uint32_t i = 0; i < tile.count; ++index, slot = 0) {
    const BlockId id =
        index < run.head.size() ? run.head[index] : run.tail[index - run.head.size()];
    const std::byte* k = op.kv.K(op.layer, id, kv_head, slot);
    const std::byte* v = ValueRow(op.kv, op.layer, id, kv_head, slot);
    for (; slot < layout.block_size && i < tile.count; ++slot, ++i) {
      tile.k[i] = k;
      tile.v[i] = v;
      k += layout.token_stride;
      v += layout.token_stride;
    }
  }
}

// The state of one chunk's keys, up to `end`. Tiles begin where they do without a window, so that a
// row's bits do not depend on what the others of its item see.
void AttendChunk(const Operation& op, const KeyRun& run, uint32_t kv_head, uint32_t chunk,
                 uint32_t end, RowBlock block, const SoftmaxState& state, float* tile_scratch) {
  state.Clear();
  block.acc = state.acc;
  block.m = state.m;
  block.l = state.l;
  const uint32_t chunk_end = std::min(end, (chunk + 1) * kChunkKeys);
  uint32_t first = std::max(chunk * kChunkKeys, run.first_key / kTileKeys * kTileKeys);
  if (first >= chunk_end || run.first_key >= end) return;
  KeyTile tiles[2];
  KeyTile* tile = &tiles[0];
  KeyTile* next = &tiles[1];
  GatherTile(op, run, kv_head, first, end, *tile);
  for (; first < chunk_end; first += kTileKeys, std::swap(tile, next)) {
    const bool more = first + kTileKeys < end;  // perhaps in the next chunk
    if (more) GatherTile(op, run, kv_head, first + kTileKeys, end, *next);
    op.attend_tile(*tile, more ? *next : *tile, block, tile_scratch);
  }
}

void WriteRows(const Operation& op, const RowItem& item, uint32_t kv_head,
               const SoftmaxState& state) {
  const float v_scale = op.kv.VScale(op.layer, kv_head);
  uint32_t packed = 0;
  for (const RowSegment& segment : item.segments) {
    for (uint32_t i = 0; i < segment.rows; ++i) {
      const size_t first_head = op.FirstHead(segment.first_row + i, kv_head);
      for (uint32_t g = 0; g < op.group; ++g, ++packed) {
        item.lse[first_head + g] =
            state.Finish(packed, op.dim, v_scale, item.out + (first_head + g) * op.dim);
      }
    }
  }
}

// One KV head of an item: all its chunks, or one chunk whose state is kept in `partial`.
struct Unit {
  uint32_t item = 0;
  uint32_t kv_head = 0;
  std::optional<uint32_t> chunk;
  float* partial = nullptr;
};

void Execute(const Operation& op, const RowItem& item, const Unit& unit) {
  thread_local Scratch scratch;
  const uint32_t rows = op.PackedRows(item);
  const size_t packed_floats = PackedRows::Floats(op, rows);
  const size_t state_floats = SoftmaxState::Floats(rows, op.padded_dim);
  float* memory = scratch.Reserve(packed_floats + 2 * state_floats + TileScratchFloats(op.dim));
  float* total_memory = memory + packed_floats;
  float* chunk_memory = total_memory + state_floats;
  float* tile_scratch = chunk_memory + state_floats;

  const PackedRows packed = PackedRows::In(memory, op, rows);
  const uint32_t end = PackRows(op, item, unit.kv_head, packed);
  const RowBlock block{.rows = rows,
                       .head_dim = op.dim,
                       .scale = op.scale * op.kv.KScale(op.layer, unit.kv_head),
                       .soft_cap = op.kind.soft_cap,
                       .begin = packed.begin,
                       .end = packed.end,
                       .slope = packed.slope,
                       .position = packed.position,
                       .q = packed.q};
  if (unit.chunk.has_value()) {
    AttendChunk(op, item.run, unit.kv_head, *unit.chunk, end, block,
                SoftmaxState::In(unit.partial, rows, op.padded_dim), tile_scratch);
    return;
  }
  const auto total = SoftmaxState::In(total_memory, rows, op.padded_dim);
  const auto next = SoftmaxState::In(chunk_memory, rows, op.padded_dim);
  const uint32_t first_chunk = FirstChunk(item.run);
  AttendChunk(op, item.run, unit.kv_head, first_chunk, end, block, total, tile_scratch);
  for (uint32_t chunk = 1; chunk < Chunks(item.run); ++chunk) {
    AttendChunk(op, item.run, unit.kv_head, first_chunk + chunk, end, block, next, tile_scratch);
    total.Add(next);
  }
  WriteRows(op, item, unit.kv_head, total);
}

// Which thread-sized pieces a call consists of.
struct Schedule {
  // An item of which each chunk is a unit of its own.
  struct Shared {
    uint32_t item = 0;
    size_t first_partial = 0;  // [kv_head][chunk] states from here
  };
  std::vector<Unit> units;
  std::vector<Shared> shared;
  size_t grain = 1;
};

// About the nanoseconds of one KV head of an item: widening and transposing the keys, then two
// products.
double CostNs(const Operation& op, const RowItem& item) {
  const uint32_t keys = item.run.keys - item.run.first_key;
  return 200.0 + 0.04 * keys * op.dim * (op.PackedRows(item) + 12);
}

Schedule MakeSchedule(const Operation& op, std::span<const RowItem> items, Scratch& partials) {
  double total_ns = 0;
  for (const RowItem& item : items) total_ns += CostNs(op, item) * op.kv_heads;
  const int threads = Parallelism();
  // What takes longer than a quarter of a thread's share would keep the others waiting.
  const double share_ns = std::max(total_ns / threads / 4, 20e3);

  Schedule schedule;
  size_t partial_floats = 0;
  for (uint32_t i = 0; i < items.size(); ++i) {
    const size_t floats = SoftmaxState::Floats(op.PackedRows(items[i]), op.padded_dim) *
                          Chunks(items[i].run) * op.kv_heads;
    if (threads > 1 && Chunks(items[i].run) > 1 && CostNs(op, items[i]) > share_ns &&
        partial_floats + floats <= kMaxPartialFloats) {
      schedule.shared.push_back({i, partial_floats});
      partial_floats += floats;
    } else {
      for (uint32_t head = 0; head < op.kv_heads; ++head) schedule.units.push_back({i, head, {}});
    }
  }
  float* memory = partials.Reserve(partial_floats);
  for (const Schedule::Shared& shared : schedule.shared) {
    const RowItem& item = items[shared.item];
    const size_t floats = SoftmaxState::Floats(op.PackedRows(item), op.padded_dim);
    float* next = memory + shared.first_partial;
    for (uint32_t head = 0; head < op.kv_heads; ++head) {
      for (uint32_t chunk = 0; chunk < Chunks(item.run); ++chunk, next += floats) {
        schedule.units.push_back({shared.item, head, FirstChunk(item.run) + chunk, next});
      }
    }
  }
  const double average_ns =
      total_ns / static_cast<double>(std::max<size_t>(schedule.units.size(), 1));
  schedule.grain = 1 + static_cast<size_t>(20e3 / average_ns);
  return schedule;
}

// Adds up the chunks of one KV head of a shared item.
void Combine(const Operation& op, const RowItem& item, uint32_t kv_head, float* partials) {
  const uint32_t rows = op.PackedRows(item);
  const size_t floats = SoftmaxState::Floats(rows, op.padded_dim);
  const uint32_t chunks = Chunks(item.run);
  float* first = partials + floats * chunks * kv_head;
  const auto total = SoftmaxState::In(first, rows, op.padded_dim);
  for (uint32_t chunk = 1; chunk < chunks; ++chunk) {
    total.Add(SoftmaxState::In(first + floats * chunk, rows, op.padded_dim));
  }
  WriteRows(op, item, kv_head, total);
}

}  // namespace

void AppendItems(const RowItem& rows, uint32_t group, uint32_t window,
                 std::vector<RowItem>& items) {
  const uint32_t most = std::max(kMaxPackedRows / group, 1U);
  RowItem next{{}, rows.run, rows.out, rows.lse};
  uint32_t packed = 0;
  const auto start = [&] {
    next.segments.clear();
    next.run.keys = 0;
    next.run.first_key = window > 0 ? rows.run.keys : 0;
    packed = 0;
  };
  const auto finish = [&] {
    next.run.first_key = std::min(next.run.first_key, next.run.keys);
    items.push_back(next);
  };
  start();
  for (const RowSegment& segment : rows.segments) {
    for (uint32_t done = 0; done < segment.rows;) {
      const uint32_t count = std::min(segment.rows - done, most - packed);
      next.segments.push_back({segment.first_row + done, count, segment.first_visible + done});
      const int64_t first_sees = segment.first_visible + done - window;
      next.run.first_key =
          static_cast<uint32_t>(std::clamp<int64_t>(first_sees, 0, next.run.first_key));
      done += count;
      packed += count;
      const int64_t last_sees = segment.first_visible + done - 1;
      next.run.keys =
          static_cast<uint32_t>(std::clamp<int64_t>(last_sees, next.run.keys, rows.run.keys));
      if (packed == most) {
        finish();
        start();
      }
    }
  }
  if (packed > 0) finish();
}

void AttendRows(const KvView& kv, uint32_t layer, const Batch& batch,
                std::span<const RowItem> items, const float* q) {
  const KvLayout& layout = kv.layout();
  const Operation op{.kv = kv,
                     .layer = layer,
                     .query_heads = batch.query_heads,
                     .kv_heads = layout.kv_heads,
                     .group = batch.query_heads / layout.kv_heads,
                     .dim = layout.head_dim,
                     .padded_dim = PaddedDim(layout.head_dim),
                     .scale = batch.scale,
                     .kind = batch.kind,
                     .q = q,
                     .attend_tile = BestTileKernel().attend};
  Scratch partials;
  const Schedule schedule = MakeSchedule(op, items, partials);
  ParallelFor(schedule.units.size(), schedule.grain, [&](size_t begin, size_t end) {
    for (size_t i = begin; i < end; ++i) {
      Execute(op, items[schedule.units[i].item], schedule.units[i]);
    }
  });
  float* memory = partials.Reserve(0);
  ParallelFor(schedule.shared.size() * op.kv_heads, 1, [&](size_t begin, size_t end) {
    for (size_t i = begin; i < end; ++i) {
      const Schedule::Shared& shared = schedule.shared[i / op.kv_heads];
      Combine(op, items[shared.item], static_cast<uint32_t>(i % op.kv_heads),
              memory + shared.first_partial);
    }
  });
}

}  // namespace kvrelay::attention
