// The floor of all pulls on one host: loops that copy scattered slices and do nothing else.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <span>

#include "base/parallel.h"
#include "kvcache/copy_plan.h"

#if defined(__SSE2__)
#include <emmintrin.h>
#endif

namespace kvrelay::tools {

// Calls copy(segment, the segment some 2 KiB further on) for all, on as many threads as Parallelism
// allows.
template <typename Copy>
void EachSlice(std::span<const CopySegment> segments, uint64_t slice_bytes, Copy&& copy) {
  const uint64_t grain = std::max<uint64_t>(1, (uint64_t{1} << 20) / slice_bytes);
  ParallelFor(segments.size(), grain, [&](size_t begin, size_t end) {
    for (size_t i = begin; i < end; ++i) {
      copy(segments[i], segments[std::min(end - 1, i + 1 + 2048 / slice_bytes)]);
    }
  });
}

inline void CopySlices(std::span<const CopySegment> segments, uint64_t slice_bytes,
                       const std::byte* src, std::byte* dst) {
  EachSlice(segments, slice_bytes, [&](const CopySegment& s, const CopySegment&) {
    std::memcpy(dst + s.dst, src + s.src, slice_bytes);
  });
}

// The best that we know of: vector loads, non-temporal stores, the next slices asked for. Slices of
// multiples of 64 bytes.
inline void StreamSlices(std::span<const CopySegment> segments, uint64_t slice_bytes,
                         const std::byte* src, std::byte* dst) {
#if defined(__SSE2__)
  EachSlice(segments, slice_bytes, [&](const CopySegment& s, const CopySegment& n) {
    const std::byte* const from = src + s.src;
    for (uint64_t at = 0; at < slice_bytes; at += 64) {
      const std::byte* const ahead =
          at + 2048 < slice_bytes ? from + at + 2048 : src + n.src + at % 4096;
      _mm_prefetch(reinterpret_cast<const char*>(ahead), _MM_HINT_T0);
      for (uint64_t i = at; i < at + 64; i += 16) {
        _mm_stream_si128(reinterpret_cast<__m128i*>(dst + s.dst + i),
                         _mm_loadu_si128(reinterpret_cast<const __m128i*>(from + i)));
      }
    }
  });
  _mm_sfence();
#else
  CopySlices(segments, slice_bytes, src, dst);
#endif
}

}  // namespace kvrelay::tools
