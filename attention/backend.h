// Which attention an engine runs, and why not the others.
#pragma once

#include <array>
#include <cstdint>
#include <functional>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "base/status.h"
#include "kvcache/layout.h"

namespace kvrelay::attention {

// What layers may ask for beyond causal attention with one or several query heads per KV head,
// which all backends serve.
struct KindSet {
  bool window = false;
  bool soft_cap = false;
  bool alibi = false;
  bool mla = false;
  // "causal, window, soft_cap, alibi"
  std::string ToString() const;
};

// Best first.
enum class Backend : uint8_t { kMla = 0, kRelay = 1, kPaged = 2, kNaive = 3 };
inline constexpr std::array kBackends = {Backend::kMla, Backend::kRelay, Backend::kPaged,
                                         Backend::kNaive};
// "mla_attn", "relay_attn", "paged_attn", "naive_attn"
std::string_view BackendName(Backend backend);
// kInvalidArgument lists the names that exist.
Result<Backend> BackendFromName(std::string_view name);

// What a backend serves. A new one joins by its line in backend.cc's table.
struct BackendTraits {
  Backend backend = Backend::kNaive;
  std::string_view name;
  KindSet kinds;
  std::vector<DType> cache_dtypes;
  bool mla_only = false;
  bool relays = false;  // reads shared prefixes once for all, where relay is enabled
};
const BackendTraits& TraitsOf(Backend backend);

// What a rank asks for.
struct BackendRequest {
  uint32_t head_dim = 0;
  uint32_t query_heads = 0;  // of this rank
  uint32_t kv_heads = 0;     // of this rank
  DType cache_dtype = DType::kFp32;
  uint32_t block_size = 0;
  KindSet kinds{};  // of all its layers
  bool relay_enabled = true;
  std::string_view wanted =
      {};  // a backend's name overrides the order of preference; empty: the best
};

struct BackendChoice {
  struct Rejected {
    Backend backend;
    std::string why;
  };
  Backend backend = Backend::kPaged;
  std::string why;                 // "best of 3, bf16 cache, causal, window, avx2 kernel"
  std::vector<Rejected> rejected;  // the backends that this request rules out
  std::string ToString()
      const;  // "paged_attn (best of 2, bf16 cache, causal, avx2 kernel); relay_attn: disabled"
};

// The best of those that `why_not` has nothing against, or the wanted one (empty: the best);
// `facts` end the choice's `why`. Errors as GetAttnBackend.
Result<BackendChoice> ChooseBackend(
    std::string_view wanted, const std::function<std::optional<std::string>(Backend)>& why_not,
    const std::function<std::string(Backend)>& facts);

// Of the host's. The best backend that can serve the request, or the wanted one. kIncompatible,
// with each backend's reason, when none can, or the wanted one cannot; kInvalidArgument when no
// backend has the wanted name.
Result<BackendChoice> GetAttnBackend(const BackendRequest& request);

}  // namespace kvrelay::attention
