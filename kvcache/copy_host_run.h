// How one contiguous run is copied: loads and stores of whole vectors, in assembly where the
// compiler must not look. Three reasons: the source may change under the loads (another process
// writes it), which C++ has no word for; ThreadSanitizer intercepts memcpy, also one that the
// compiler makes out of a loop; and one template serves every instruction set without the
// functions' target attributes getting in the way of inlining.
#pragma once

#include <cstddef>
#include <cstdint>

#if defined(__GNUC__)
#define KVRELAY_RACING __attribute__((no_sanitize("thread"), always_inline)) inline
#endif

namespace kvrelay::internal {

constexpr size_t kLine = 64;  // bytes of a cache line

// Each instruction set has Copy16, Copy32 and Copy64 (any alignment), Stream64 (destination on a
// line; goes around the caches), and Finish, which makes streamed lines visible in order and leaves
// the vector unit as the ABI wants it.
#if defined(__x86_64__)

struct Sse2 {
  KVRELAY_RACING static void Copy16(std::byte* dst, const std::byte* src) {
    asm volatile("movups (%1), %%xmm0\n\tmovups %%xmm0, (%0)" ::"r"(dst), "r"(src)
                 : "xmm0", "memory");
  }
  KVRELAY_RACING static void Copy32(std::byte* dst, const std::byte* src) {
    asm volatile(
        "movups (%1), %%xmm0\n\tmovups 16(%1), %%xmm1\n\t"
        "movups %%xmm0, (%0)\n\tmovups %%xmm1, 16(%0)" ::"r"(dst),
        "r"(src)
        : "xmm0", "xmm1", "memory");
  }
  KVRELAY_RACING static void Copy64(std::byte* dst, const std::byte* src) {
    asm volatile(
        "movups (%1), %%xmm0\n\tmovups 16(%1), %%xmm1\n\t"
        "movups 32(%1), %%xmm2\n\tmovups 48(%1), %%xmm3\n\t"
        "movups %%xmm0, (%0)\n\tmovups %%xmm1, 16(%0)\n\t"
        "movups %%xmm2, 32(%0)\n\tmovups %%xmm3, 48(%0)" ::"r"(dst),
        "r"(src)
        : "xmm0", "xmm1", "xmm2", "xmm3", "memory");
  }
  KVRELAY_RACING static void Stream64(std::byte* dst, const std::byte* src) {
    asm volatile(
        "movups (%1), %%xmm0\n\tmovups 16(%1), %%xmm1\n\t"
        "movups 32(%1), %%xmm2\n\tmovups 48(%1), %%xmm3\n\t"
        "movntps %%xmm0, (%0)\n\tmovntps %%xmm1, 16(%0)\n\t"
        "movntps %%xmm2, 32(%0)\n\tmovntps %%xmm3, 48(%0)" ::"r"(dst),
        "r"(src)
        : "xmm0", "xmm1", "xmm2", "xmm3", "memory");
  }
  KVRELAY_RACING static void Finish() { asm volatile("sfence" ::: "memory"); }
};

struct Avx2 {
  KVRELAY_RACING static void Copy16(std::byte* dst, const std::byte* src) {
    asm volatile("vmovups (%1), %%xmm0\n\tvmovups %%xmm0, (%0)" ::"r"(dst), "r"(src)
                 : "xmm0", "memory");
  }
  KVRELAY_RACING static void Copy32(std::byte* dst, const std::byte* src) {
    asm volatile("vmovups (%1), %%ymm0\n\tvmovups %%ymm0, (%0)" ::"r"(dst), "r"(src)
                 : "xmm0", "memory");
  }
  KVRELAY_RACING static void Copy64(std::byte* dst, const std::byte* src) {
    asm volatile(
        "vmovups (%1), %%ymm0\n\tvmovups 32(%1), %%ymm1\n\t"
        "vmovups %%ymm0, (%0)\n\tvmovups %%ymm1, 32(%0)" ::"r"(dst),
        "r"(src)
        : "xmm0", "xmm1", "memory");
  }
  KVRELAY_RACING static void Stream64(std::byte* dst, const std::byte* src) {
    asm volatile(
        "vmovups (%1), %%ymm0\n\tvmovups 32(%1), %%ymm1\n\t"
        "vmovntps %%ymm0, (%0)\n\tvmovntps %%ymm1, 32(%0)" ::"r"(dst),
        "r"(src)
        : "xmm0", "xmm1", "memory");
  }
  KVRELAY_RACING static void Finish() { asm volatile("sfence\n\tvzeroupper" ::: "memory"); }
};

struct Avx512 {
  KVRELAY_RACING static void Copy16(std::byte* dst, const std::byte* src) {
    Avx2::Copy16(dst, src);
  }
  KVRELAY_RACING static void Copy32(std::byte* dst, const std::byte* src) {
    Avx2::Copy32(dst, src);
  }
  KVRELAY_RACING static void Copy64(std::byte* dst, const std::byte* src) {
    asm volatile("vmovups (%1), %%zmm0\n\tvmovups %%zmm0, (%0)" ::"r"(dst), "r"(src)
                 : "xmm0", "memory");
  }
  KVRELAY_RACING static void Stream64(std::byte* dst, const std::byte* src) {
    asm volatile("vmovups (%1), %%zmm0\n\tvmovntps %%zmm0, (%0)" ::"r"(dst), "r"(src)
                 : "xmm0", "memory");
  }
  KVRELAY_RACING static void Finish() { Avx2::Finish(); }
};

#endif

// A machine word wherever it lies.
template <typename Word>
struct __attribute__((packed, may_alias)) Unaligned {
  Word word;
};

template <typename Word>
KVRELAY_RACING void CopyWord(std::byte* dst, const std::byte* src) {
  const Word word = reinterpret_cast<const volatile Unaligned<Word>*>(src)->word;
  reinterpret_cast<Unaligned<Word>*>(dst)->word = word;
}

// Without vector code of our own: any machine.
struct Portable {
  KVRELAY_RACING static void Copy16(std::byte* dst, const std::byte* src) {
    CopyWord<uint64_t>(dst, src);
    CopyWord<uint64_t>(dst + 8, src + 8);
  }
  KVRELAY_RACING static void Copy32(std::byte* dst, const std::byte* src) {
    Copy16(dst, src);
    Copy16(dst + 16, src + 16);
  }
  KVRELAY_RACING static void Copy64(std::byte* dst, const std::byte* src) {
    Copy32(dst, src);
    Copy32(dst + 32, src + 32);
  }
  KVRELAY_RACING static void Stream64(std::byte* dst, const std::byte* src) { Copy64(dst, src); }
  KVRELAY_RACING static void Finish() {}
};

// Two overlapping parts cover every length from one part to two.
template <typename Isa>
KVRELAY_RACING void CopyShort(std::byte* dst, const std::byte* src, size_t bytes) {
  if (bytes >= 32) {
    Isa::Copy32(dst, src);
    Isa::Copy32(dst + bytes - 32, src + bytes - 32);
  } else if (bytes >= 16) {
    Isa::Copy16(dst, src);
    Isa::Copy16(dst + bytes - 16, src + bytes - 16);
  } else if (bytes >= 8) {
    CopyWord<uint64_t>(dst, src);
    CopyWord<uint64_t>(dst + bytes - 8, src + bytes - 8);
  } else if (bytes >= 4) {
    CopyWord<uint32_t>(dst, src);
    CopyWord<uint32_t>(dst + bytes - 4, src + bytes - 4);
  } else {
    for (size_t i = 0; i < bytes; ++i) CopyWord<uint8_t>(dst + i, src + i);
  }
}

// While a line is copied the memory is asked for the ones so many bytes behind it, or before it:
// there the copies that follow will read and write. Prefetching never faults, whatever the address.
struct Ahead {
  ptrdiff_t src = 0;
  ptrdiff_t dst = 0;  // nothing to ask for where stores go around the caches
};
template <bool kStream>
KVRELAY_RACING void Prefetch(const std::byte* dst, const std::byte* src, Ahead ahead) {
  const auto at = [](const std::byte* from, ptrdiff_t by) {
    return reinterpret_cast<const void*>(reinterpret_cast<uintptr_t>(from) +
                                         static_cast<uintptr_t>(by));
  };
  __builtin_prefetch(at(src, ahead.src));
  if (!kStream) __builtin_prefetch(at(dst, ahead.dst), 1);
}

template <typename Isa, bool kStream>
KVRELAY_RACING void CopyRun(std::byte* dst, const std::byte* src, size_t bytes, Ahead ahead) {
  if (bytes < kLine) {
    Prefetch<kStream>(dst, src, ahead);
    return CopyShort<Isa>(dst, src, bytes);
  }
  size_t at = 0;
  if (kStream && reinterpret_cast<uintptr_t>(dst) % kLine != 0) {
    Prefetch<kStream>(dst, src, ahead);
    Isa::Copy64(dst, src);
    at = kLine - reinterpret_cast<uintptr_t>(dst) % kLine;
  }
  for (; at + kLine <= bytes; at += kLine) {
    Prefetch<kStream>(dst + at, src + at, ahead);
    if (kStream) {
      Isa::Stream64(dst + at, src + at);
    } else {
      Isa::Copy64(dst + at, src + at);
    }
  }
  if (at < bytes) {
    Prefetch<kStream>(dst + bytes - 1, src + bytes - 1, ahead);
    Isa::Copy64(dst + bytes - kLine, src + bytes - kLine);
  }
}

}  // namespace kvrelay::internal
