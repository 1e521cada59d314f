#include "engine/kv_scales.h"

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstring>
#include <map>
#include <tuple>

#include "kvcache/kv_view.h"

namespace kvrelay::engine {
namespace {

constexpr uint32_t kMostTokens = 256;
constexpr float kMargin = 1.25F;

float LargestFinite(DType dtype) {
  switch (dtype) {
    case DType::kFp8E4m3:
      return 448;
    case DType::kFp8E5m2:
      return 57344;
    default:
      return 127;
  }
}

// Normal, and so is its inverse, whatever was seen.
float ScaleFor(float largest, DType dtype) {
  constexpr int kMostExponent = 100;
  int exponent = 0;
  const float least = largest * kMargin / LargestFinite(dtype);
  const float fraction = std::frexp(least, &exponent);  // in [1/2, 1), or 0
  if (fraction == 0) return 1;
  if (fraction == 0.5F) --exponent;
  return std::ldexp(1.0F, std::clamp(exponent, -kMostExponent, kMostExponent));
}

// The largest magnitudes that one head of K or V had, by (layer of the model, is V, KV head).
using Largest = std::map<std::tuple<uint32_t, bool, uint32_t>, float>;

float LargestOfRow(const std::byte* row, uint32_t count) {
  float largest = 0;
  for (uint32_t i = 0; i < count; ++i) {
    float number = 0;
    std::memcpy(&number, row + i * sizeof(number), sizeof(number));
    largest = std::fmax(largest, std::fabs(number));
  }
  return largest;
}

Largest LargestOf(std::span<const KvRank> ranks, std::span<const BlockId> blocks, uint32_t tokens) {
  Largest largest;
  for (const KvRank& rank : ranks) {
    const KvView view(rank.layout, {rank.region.data()});
    const KvLayout& layout = rank.layout;
    for (uint32_t layer = 0; layer < layout.layers(); ++layer) {
      for (uint32_t head = 0; head < layout.kv_heads; ++head) {
        const auto at = [&](bool v) -> float& {
          return largest[{rank.shard.layer_begin + layer, v, rank.shard.head_begin + head}];
        };
        for (uint32_t token = 0; token < tokens; ++token) {
          const BlockId block = blocks[token / layout.block_size];
          const uint32_t slot = token % layout.block_size;
          const auto take = [&](bool v, const std::byte* row) {
            at(v) = std::fmax(at(v), LargestOfRow(row, layout.head_dim));
          };
          take(false, view.K(layer, block, head, slot));
          if (layout.has_v()) take(true, view.V(layer, block, head, slot));
        }
      }
    }
  }
  return largest;
}

}  // namespace

bool WantsScales(const EngineOptions& options) {
  return options.kv_dtype && SizeOf(*options.kv_dtype) == 1 &&
         options.kv_scales != KvScaling::kNone;
}

std::vector<uint32_t> SampleTokens(const ModelConfig& config) {
  std::vector<uint32_t> ids(std::min(kMostTokens, config.max_position));
  uint64_t state = 1;
  for (uint32_t& id : ids) {
    state = state * 6364136223846793005U + 1442695040888963407U;
    id = static_cast<uint32_t>((state >> 33) % config.vocab_size);
  }
  if (config.bos_id) ids.front() = *config.bos_id;
  return ids;
}

std::vector<KvScales> MeasureScales(std::span<const KvRank> ranks, std::span<const BlockId> blocks,
                                    uint32_t tokens, DType dtype, KvScaling scaling) {
  const Largest largest = LargestOf(ranks, blocks, tokens);
  std::vector<KvScales> scales;
  for (const KvRank& rank : ranks) {
    const KvShard& shard = rank.shard;
    KvScales& own = scales.emplace_back();
    own.per_head = scaling == KvScaling::kHead;
    for (uint32_t layer = shard.layer_begin; layer < shard.layer_end(); ++layer) {
      for (const bool v : {false, true}) {
        if (v && !rank.layout.has_v()) continue;
        std::vector<float>& to = v ? own.v : own.k;
        if (own.per_head) {
          for (uint32_t head = shard.head_begin; head < shard.head_end(); ++head) {
            to.push_back(ScaleFor(largest.at({layer, v, head}), dtype));
          }
        } else {
          float of_all = 0;
          for (auto it = largest.lower_bound({layer, v, 0});
               it != largest.end() && std::get<0>(it->first) == layer &&
               std::get<1>(it->first) == v;
               ++it) {
            of_all = std::fmax(of_all, it->second);
          }
          to.push_back(ScaleFor(of_all, dtype));
        }
      }
    }
  }
  return scales;
}

}  // namespace kvrelay::engine
