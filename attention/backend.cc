#include "attention/backend.h"

#include <algorithm>
#include <optional>

#include "attention/tile_kernel.h"

namespace kvrelay::attention {
namespace {

constexpr KindSet kAllKinds = {.window = true, .soft_cap = true, .alibi = true, .mla = true};

const std::vector<BackendTraits>& AllTraits() {
  const std::vector<DType> all = {DType::kFp32,    DType::kFp16,    DType::kBf16,
                                  DType::kFp8E4m3, DType::kFp8E5m2, DType::kInt8};
  static const auto* traits =
      new std::vector<BackendTraits>{{Backend::kMla, "mla_attn", kAllKinds, all, true, true},
                                     {Backend::kRelay, "relay_attn", kAllKinds, all, false, true},
                                     {Backend::kPaged, "paged_attn", kAllKinds, all},
                                     {Backend::kNaive, "naive_attn", kAllKinds, all}};
  return *traits;
}

std::string Names(const std::vector<DType>& dtypes) {
  std::string text;
  for (const DType dtype : dtypes)
    text += (text.empty() ? "" : ", ") + std::string(DTypeName(dtype));
  return text;
}

// Why a backend cannot serve the request, if so.
std::optional<std::string> WhyNot(Backend backend, const BackendRequest& request) {
  const BackendTraits& traits = TraitsOf(backend);
  const KindSet& asked = request.kinds;
  if (traits.mla_only && !asked.mla) return "serves MLA only";
  if (asked.mla && !traits.kinds.mla) return "knows no MLA";
  if (asked.mla && request.kv_heads != 1) {
    return "MLA has one latent head, not " + std::to_string(request.kv_heads);
  }
  if (asked.window && !traits.kinds.window) return "knows no sliding window";
  if (asked.soft_cap && !traits.kinds.soft_cap) return "knows no soft cap";
  if (asked.alibi && !traits.kinds.alibi) return "knows no ALiBi";
  if (request.head_dim == 0 || request.block_size == 0 || request.kv_heads == 0) {
    return "head_dim " + std::to_string(request.head_dim) + ", block_size " +
           std::to_string(request.block_size) + ", kv_heads " + std::to_string(request.kv_heads) +
           ": none may be 0";
  }
  if (request.query_heads == 0 || request.query_heads % request.kv_heads != 0) {
    return std::to_string(request.query_heads) + " query heads are no multiple of " +
           std::to_string(request.kv_heads) + " KV heads";
  }
  if (std::ranges::find(traits.cache_dtypes, request.cache_dtype) == traits.cache_dtypes.end()) {
    return std::string(DTypeName(request.cache_dtype)) + " cache: reads " +
           Names(traits.cache_dtypes);
  }
  if (backend == Backend::kRelay && !request.relay_enabled) return "disabled";
  return std::nullopt;
}

std::string Join(const std::vector<BackendChoice::Rejected>& rejected) {
  std::string text;
  for (const auto& [backend, why] : rejected) {
    if (!text.empty()) text += "; ";
    text += std::string(BackendName(backend)) + ": " + why;
  }
  return text;
}

}  // namespace

std::string KindSet::ToString() const {
  return std::string("causal") + (window ? ", window" : "") + (soft_cap ? ", soft_cap" : "") +
         (alibi ? ", alibi" : "") + (mla ? ", mla" : "");
}

const BackendTraits& TraitsOf(Backend backend) { return AllTraits()[static_cast<size_t>(backend)]; }

std::string_view BackendName(Backend backend) { return TraitsOf(backend).name; }

Result<Backend> BackendFromName(std::string_view name) {
  std::string known;
  for (const Backend backend : kBackends) {
    if (name == BackendName(backend)) return backend;
    known += (known.empty() ? "" : ", ") + std::string(BackendName(backend));
  }
  return Error(Code::kInvalidArgument,
               "no attention backend is called \"" + std::string(name) + "\"; there are " + known);
}

std::string BackendChoice::ToString() const {
  std::string text = std::string(BackendName(backend)) + " (" + why + ")";
  if (!rejected.empty()) text += "; " + Join(rejected);
  return text;
}

Result<BackendChoice> ChooseBackend(
    std::string_view wanted_name, const std::function<std::optional<std::string>(Backend)>& why_not,
    const std::function<std::string(Backend)>& facts) {
  std::optional<Backend> wanted;
  if (!wanted_name.empty()) {
    KVRELAY_ASSIGN_OR_RETURN(wanted, BackendFromName(wanted_name));
  }
  BackendChoice choice;
  std::vector<Backend> usable;
  for (const Backend backend : kBackends) {
    if (std::optional<std::string> why = why_not(backend)) {
      choice.rejected.push_back({backend, *std::move(why)});
    } else {
      usable.push_back(backend);
    }
  }
  if (usable.empty()) {
    return Error(Code::kIncompatible, "no attention backend fits: " + Join(choice.rejected));
  }
  if (wanted.has_value() && std::ranges::find(usable, *wanted) == usable.end()) {
    return Error(Code::kIncompatible,
                 std::string(BackendName(*wanted)) +
                     " was asked for and cannot serve: " + Join(choice.rejected));
  }
  choice.backend = wanted.value_or(usable.front());
  choice.why =
      (wanted.has_value() ? "asked for, " : "best of " + std::to_string(usable.size()) + ", ") +
      facts(choice.backend);
  return choice;
}

Result<BackendChoice> GetAttnBackend(const BackendRequest& request) {
  return ChooseBackend(
      request.wanted, [&](Backend backend) { return WhyNot(backend, request); },
      [&](Backend backend) {
        const std::string facts =
            std::string(DTypeName(request.cache_dtype)) + " cache, " + request.kinds.ToString();
        if (backend == Backend::kNaive) return facts;
        return facts + ", " + std::string(BestTileKernel().name) + " kernel";
      });
}

}  // namespace kvrelay::attention
