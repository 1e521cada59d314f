#include "tools/kvrelay/bench/pull_case.h"

#include <algorithm>
#include <cstring>
#include <memory>
#include <numeric>
#include <random>
#include <utility>

namespace kvrelay::tools {
namespace {

// As bf16 all words are numbers from 2^-7 to 2, of both signs: casts of subnormal ones would take a
// hundred times as long. The peers' programs in bench/peers know it, too.
uint64_t PatternAt(uint64_t offset) {
  const uint64_t hash = (offset / 8 + 1) * 0x9e3779b97f4a7c15ULL;
  return (hash & 0x83ff83ff83ff83ffULL) | 0x3c003c003c003c00ULL;
}

std::vector<uint32_t> Shuffled(uint64_t count, uint64_t seed) {
  std::vector<uint32_t> places(count);
  std::iota(places.begin(), places.end(), 0);
  std::shuffle(places.begin(), places.end(), std::mt19937_64(seed));
  return places;
}

CopyPlan OneBox(uint64_t run_bytes, std::vector<CopySegment> segments) {
  CopyPlan plan;
  plan.boxes.resize(1);
  plan.boxes[0].run_bytes = run_bytes;
  plan.boxes[0].num_segments = static_cast<uint32_t>(segments.size());
  plan.places.resize(1);
  plan.segments = std::move(segments);
  return plan;
}

}  // namespace

PullCase PullCase::Make(uint64_t memory_bytes, uint64_t slice_bytes, uint32_t set, uint64_t count) {
  PullCase pull{memory_bytes, slice_bytes, set, count};
  const std::vector<uint32_t> from = Shuffled(memory_bytes / slice_bytes, slice_bytes);
  const std::vector<uint32_t> to = Shuffled(memory_bytes / slice_bytes, slice_bytes + 1);
  const uint64_t first = set * MaxCount(memory_bytes, slice_bytes);
  pull.slices.reserve(count);
  for (uint64_t i = first; i < first + count; ++i) {
    pull.slices.push_back({from[i] * slice_bytes, to[i] * slice_bytes});
  }
  return pull;
}

CopyPlan PullCase::Plan() const { return OneBox(slice_bytes, slices); }

transport::StreamPlan PullCase::Stream(uint64_t chunk_bytes, bool pack) const {
  // A chunk is a part of one slice, or some whole ones.
  const uint64_t piece = std::min(slice_bytes, chunk_bytes);
  const uint64_t per_slice = slice_bytes / piece;
  const uint64_t per_chunk = chunk_bytes / piece;
  const uint64_t pieces = slices.size() * per_slice;
  const auto chunks = static_cast<uint32_t>((pieces + per_chunk - 1) / per_chunk);
  const auto shared = std::make_shared<const std::vector<CopySegment>>(slices);
  return {chunks, chunk_bytes, [=](uint32_t chunk) -> Result<CopyPlan> {
            const uint64_t begin = chunk * per_chunk;
            const uint64_t end = std::min(pieces, begin + per_chunk);
            std::vector<CopySegment> segments;
            segments.reserve(end - begin);
            for (uint64_t i = begin; i < end; ++i) {
              const CopySegment& whole = (*shared)[i / per_slice];
              const uint64_t inside = i % per_slice * piece;
              const uint64_t packed = (i - begin) * piece;
              segments.push_back(pack ? CopySegment{whole.src + inside, packed}
                                      : CopySegment{packed, whole.dst + inside});
            }
            return OneBox(piece, std::move(segments));
          }};
}

void FillPattern(std::span<std::byte> memory) {
  for (uint64_t at = 0; at + 8 <= memory.size(); at += 8) {
    const uint64_t word = PatternAt(at);
    std::memcpy(memory.data() + at, &word, sizeof(word));
  }
}

bool HoldsPattern(const PullCase& pull, std::span<const std::byte> memory) {
  for (const CopySegment& slice : pull.slices) {
    for (uint64_t at = 0; at < pull.slice_bytes; at += 8) {
      uint64_t word = 0;
      std::memcpy(&word, memory.data() + slice.dst + at, sizeof(word));
      if (word != PatternAt(slice.src + at)) return false;
    }
  }
  return true;
}

void Erase(const PullCase& pull, std::span<std::byte> memory) {
  for (const CopySegment& slice : pull.slices) {
    std::memset(memory.data() + slice.dst, 0, pull.slice_bytes);
  }
}

}  // namespace kvrelay::tools
