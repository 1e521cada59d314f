#include "kvcache/copy_host_cast.h"

#include <vector>

#include "base/cpu.h"
#include "kvcache/convert.h"

namespace kvrelay::internal {
namespace {

template <typename Bits>
struct __attribute__((packed, may_alias)) Unaligned {
  Bits bits;
};

// One loop that the compiler turns into vectors; the functions around it say of which width.
template <typename From, typename To>
KVRELAY_NUMBER void Convert(const std::byte* src, std::byte* dst, uint64_t elements, float factor) {
  const auto* __restrict__ from = reinterpret_cast<const Unaligned<typename From::Bits>*>(src);
  auto* __restrict__ to = reinterpret_cast<Unaligned<typename To::Bits>*>(dst);
  for (uint64_t i = 0; i < elements; ++i) {
    to[i].bits = To::FromFloat(From::ToFloat(from[i].bits) * factor);
  }
}

#define KVRELAY_CONVERT_ISA(Name, ...)                                                       \
  struct Name {                                                                              \
    template <typename From, typename To>                                                    \
    __VA_ARGS__ __attribute__((no_sanitize("thread"))) static void Run(const std::byte* src, \
                                                                       std::byte* dst,       \
                                                                       uint64_t elements,    \
                                                                       float factor) {       \
      Convert<From, To>(src, dst, elements, factor);                                         \
    }                                                                                        \
  };

KVRELAY_CONVERT_ISA(Baseline)
#if defined(__x86_64__)
KVRELAY_CONVERT_ISA(Avx2, __attribute__((target("avx2"))))
KVRELAY_CONVERT_ISA(
    Avx512, __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,prefer-vector-width=512"))))
#endif

template <typename Isa>
ConvertFn Function(DType from, DType to) {
  return WithNumber(from, [to](auto source) {
    return WithNumber(to, [](auto target) -> ConvertFn {
      return &Isa::template Run<decltype(source), decltype(target)>;
    });
  });
}

}  // namespace

std::span<const ConvertIsa> ConvertIsas() {
  static const auto* const isas = [] {
    auto* list = new std::vector<ConvertIsa>;
#if defined(__x86_64__)
    if (HasAvx512()) list->push_back({"AVX-512", Function<Avx512>});
    if (HasAvx2()) list->push_back({"AVX2", Function<Avx2>});
#endif
    list->push_back({"baseline", Function<Baseline>});
    return list;
  }();
  return *isas;
}

}  // namespace kvrelay::internal
