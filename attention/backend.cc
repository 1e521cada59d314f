#include "attention/backend.h"

#include <algorithm>
#include <optional>

#include "attention/tile_kernel.h"

namespace kvrelay::attention {
namespace {

// Why a backend cannot serve the request, if so.
std::optional<std::string> WhyNot(Backend backend, const BackendRequest& request) {
  if (request.use_mla) return "MLA: reads one latent row per token, this one needs K and V";
  if (request.head_dim == 0 || request.block_size == 0 || request.kv_heads == 0) {
    return "head_dim " + std::to_string(request.head_dim) + ", block_size " +
           std::to_string(request.block_size) + ", kv_heads " + std::to_string(request.kv_heads) +
           ": none may be 0";
  }
  if (request.query_heads == 0 || request.query_heads % request.kv_heads != 0) {
    return std::to_string(request.query_heads) + " query heads are no multiple of " +
           std::to_string(request.kv_heads) + " KV heads";
  }
  if (SizeOf(request.cache_dtype) < 2) {
    return std::string(DTypeName(request.cache_dtype)) + " cache: reads fp32, fp16 and bf16";
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

std::string_view BackendName(Backend backend) {
  switch (backend) {
    case Backend::kRelay:
      return "relay_attn";
    case Backend::kPaged:
      return "paged_attn";
    case Backend::kNaive:
      return "naive_attn";
  }
  return "unknown";
}

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

Result<BackendChoice> GetAttnBackend(const BackendRequest& request) {
  std::optional<Backend> wanted;
  if (!request.wanted.empty()) {
    KVRELAY_ASSIGN_OR_RETURN(wanted, BackendFromName(request.wanted));
  }
  BackendChoice choice;
  std::vector<Backend> usable;
  for (const Backend backend : kBackends) {
    if (std::optional<std::string> why = WhyNot(backend, request)) {
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
      std::string(DTypeName(request.cache_dtype)) + " cache";
  if (choice.backend != Backend::kNaive) {
    choice.why += ", " + std::string(BestTileKernel().name) + " kernel";
  }
  return choice;
}

}  // namespace kvrelay::attention
