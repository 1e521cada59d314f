#include "kvcache/copy_host_cast.h"

#include <vector>

#include "base/cpu.h"
#include "kvcache/copy_host_cast_one.h"

namespace kvrelay::internal {
namespace {

template <typename From, typename To>
__attribute__((no_sanitize("thread"))) void Convert(const std::byte* src, std::byte* dst,
                                                    uint64_t elements, float factor) {
  ConvertOneByOne<From, To>(src, dst, elements, factor);
}

// Whatever vectors the compiler makes for any machine of this architecture.
ConvertFn ConvertPortable(DType from, DType to) {
  return WithNumber(from, [to](auto source) {
    return WithNumber(
        to, [](auto target) -> ConvertFn { return Convert<decltype(source), decltype(target)>; });
  });
}

}  // namespace

std::span<const ConvertIsa> ConvertIsas() {
  static const auto* const isas = [] {
    auto* list = new std::vector<ConvertIsa>;
#if defined(__x86_64__)
    if (HasAvx512()) list->push_back({"AVX-512", ConvertAvx512});
    if (HasAvx2()) list->push_back({"AVX2", ConvertAvx2});
#endif
    list->push_back({"portable", ConvertPortable});
    return list;
  }();
  return *isas;
}

}  // namespace kvrelay::internal
