#include "engine/sampler.h"

#include <algorithm>
#include <cmath>
#include <numeric>
#include <string>
#include <vector>

namespace kvrelay::engine {
namespace {

// The finaliser of SplitMix64: every bit of the input changes every bit of the output.
uint64_t Mix(uint64_t z) {
  z += 0x9e3779b97f4a7c15U;
  z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9U;
  z = (z ^ (z >> 27)) * 0x94d049bb133111ebU;
  return z ^ (z >> 31);
}

// Uniform in [0, 1), 53 bits.
double Uniform(uint64_t seed, uint32_t position) {
  return static_cast<double>(Mix(Mix(seed) ^ position) >> 11) * 0x1p-53;
}

// exp((logit - largest) / temperature): probabilities up to their sum.
std::vector<double> Weights(std::span<const float> logits, double temperature) {
  const double largest = logits[Greedy(logits)];
  std::vector<double> weights(logits.size());
  for (size_t i = 0; i < logits.size(); ++i) {
    const double weight = std::exp((logits[i] - largest) / temperature);
    weights[i] = std::isnan(weight) ? 0 : weight;
  }
  return weights;
}

// The most likely tokens that together carry `mass`, most likely first.
std::vector<uint32_t> Nucleus(const std::vector<double>& weights, double mass) {
  std::vector<uint32_t> ids(weights.size());
  std::iota(ids.begin(), ids.end(), 0U);
  const auto likelier = [&](uint32_t a, uint32_t b) {
    return weights[a] != weights[b] ? weights[a] > weights[b] : a < b;
  };
  // The nucleus is small as a rule: sort as far as needed.
  size_t sorted = 0;
  double sum = 0;
  for (size_t i = 0; i < ids.size(); ++i) {
    if (i == sorted) {
      sorted = std::min(ids.size(), std::max<size_t>(64, sorted * 8));
      std::partial_sort(ids.begin() + static_cast<ptrdiff_t>(i),
                        ids.begin() + static_cast<ptrdiff_t>(sorted), ids.end(), likelier);
    }
    sum += weights[ids[i]];
    if (sum >= mass) {
      ids.resize(i + 1);
      break;
    }
  }
  return ids;
}

}  // namespace

Status SamplingOptions::Validate() const {
  if (!std::isfinite(temperature) || temperature < 0) {
    return {Code::kInvalidArgument,
            "temperature = " + std::to_string(temperature) + " is not a number from 0 up"};
  }
  if (!std::isfinite(top_p) || top_p <= 0 || top_p > 1) {
    return {Code::kInvalidArgument,
            "top_p = " + std::to_string(top_p) + " is not above 0 and at most 1"};
  }
  return Status::Ok();
}

uint32_t Greedy(std::span<const float> logits) {
  uint32_t best = 0;
  for (uint32_t i = 1; i < logits.size(); ++i) {
    if (logits[i] > logits[best] || (std::isnan(logits[best]) && !std::isnan(logits[i]))) best = i;
  }
  return best;
}

uint32_t Sample(std::span<const float> logits, const SamplingOptions& options, uint32_t position) {
  if (options.temperature == 0) return Greedy(logits);
  const std::vector<double> weights = Weights(logits, options.temperature);
  const double total = std::accumulate(weights.begin(), weights.end(), 0.0);
  if (!(total > 0) || std::isinf(total)) return Greedy(logits);

  std::vector<uint32_t> ids;
  if (options.top_p < 1) {
    ids = Nucleus(weights, options.top_p * total);
  } else {
    ids.resize(weights.size());
    std::iota(ids.begin(), ids.end(), 0U);
  }
  double mass = 0;
  for (const uint32_t id : ids) mass += weights[id];
  double left = Uniform(options.seed, position) * mass;
  uint32_t last = Greedy(logits);  // rounding may leave a rest after the last candidate
  for (const uint32_t id : ids) {
    if (weights[id] == 0) continue;
    last = id;
    left -= weights[id];
    if (left < 0) break;
  }
  return last;
}

}  // namespace kvrelay::engine
