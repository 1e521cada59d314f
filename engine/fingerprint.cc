#include "engine/fingerprint.h"

#include <array>
#include <string_view>

#include "base/hash.h"

namespace kvrelay::engine {
namespace {

constexpr uint64_t kHashEverythingUpTo = 256U << 20;
constexpr uint64_t kWindows = 16;
constexpr uint64_t kWindowBytes = 4096;

void UpdateText(ContentHasher& hasher, std::string_view text) {
  const std::array<uint64_t, 1> length = {text.size()};
  hasher.UpdateInts(std::span(length));
  hasher.Update(std::as_bytes(std::span(text)));
}

void UpdateSamples(ContentHasher& hasher, std::span<const std::byte> data) {
  if (data.size() <= kWindows * kWindowBytes) return hasher.Update(data);
  for (uint64_t i = 0; i < kWindows; ++i) {
    const uint64_t begin = (data.size() - kWindowBytes) / (kWindows - 1) * i;
    const bool last = i == kWindows - 1;
    hasher.Update(data.subspan(last ? data.size() - kWindowBytes : begin, kWindowBytes));
  }
}

constexpr std::string_view kPrefix = "prefix";

ContentHash HashIds(const ContentHash& model, std::span<const uint32_t> ids,
                    std::string_view domain) {
  ContentHasher hasher(domain);
  hasher.Update(std::as_bytes(std::span(model.bytes)));
  hasher.UpdateInts(ids);
  return hasher.Finish();
}

}  // namespace

ContentHash ModelFingerprint(const ModelConfig& config, const Checkpoint& checkpoint) {
  uint64_t bytes = 0;
  for (const auto& [name, tensor] : checkpoint.tensors()) bytes += tensor->data.size();
  ContentHasher hasher("model");
  UpdateText(hasher, config.Canonical());
  for (const auto& [name, tensor] : checkpoint.tensors()) {
    UpdateText(hasher, name);
    UpdateText(hasher, tensor->ToString());
    if (bytes <= kHashEverythingUpTo) {
      hasher.Update(tensor->data);
    } else {
      UpdateSamples(hasher, tensor->data);
    }
  }
  return hasher.Finish();
}

ContentHash PrefixHash(const ContentHash& model, std::span<const uint32_t> token_ids) {
  return HashIds(model, token_ids, kPrefix);
}

std::vector<ContentHash> PrefixNames(const ContentHash& model, std::span<const uint32_t> token_ids,
                                     uint32_t block_size) {
  ContentHasher hasher(kPrefix);
  hasher.Update(std::as_bytes(std::span(model.bytes)));
  std::vector<ContentHash> names(token_ids.size() / block_size);
  for (size_t i = 0; i < names.size(); ++i) {
    hasher.UpdateInts(token_ids.subspan(i * block_size, block_size));
    names[i] = hasher.Peek();
  }
  return names;
}

ContentHash PromptHash(const ContentHash& model, std::span<const uint32_t> token_ids) {
  return HashIds(model, token_ids, "prompt");
}

}  // namespace kvrelay::engine
