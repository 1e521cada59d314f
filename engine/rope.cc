#include "engine/rope.h"

#include <cmath>
#include <numbers>

namespace kvrelay::engine {
namespace {

// What "llama3" makes of one frequency: fast turns stay, slow ones are stretched by `factor`, and
// between the two wavelengths the result moves smoothly from one to the other.
double StretchLlama3(const RopeConfig& rope, double frequency) {
  const double wavelength = 2 * std::numbers::pi / frequency;
  const double original = rope.original_max_position;
  if (wavelength < original / rope.high_freq_factor) return frequency;
  if (wavelength > original / rope.low_freq_factor) return frequency / rope.factor;
  const double smooth = (original / wavelength - rope.low_freq_factor) /
                        (rope.high_freq_factor - rope.low_freq_factor);
  return (1 - smooth) * frequency / rope.factor + smooth * frequency;
}

}  // namespace

std::vector<float> InverseFrequencies(const RopeConfig& rope, uint32_t head_dim) {
  std::vector<float> out(head_dim / 2);
  for (size_t i = 0; i < out.size(); ++i) {
    const auto exponent = static_cast<float>(2 * i) / static_cast<float>(head_dim);
    const float plain = 1.0F / std::pow(static_cast<float>(rope.theta), exponent);
    out[i] = rope.type == RopeConfig::Type::kLlama3 ? static_cast<float>(StretchLlama3(rope, plain))
                                                    : plain;
  }
  return out;
}

RopeTable::RopeTable(std::span<const float> inverse_frequencies,
                     std::span<const uint32_t> positions)
    : half_(inverse_frequencies.size()),
      cos_(half_ * positions.size()),
      sin_(half_ * positions.size()) {
  for (size_t row = 0; row < positions.size(); ++row) {
    for (size_t i = 0; i < half_; ++i) {
      // In fp32 like the reference: the product's rounding is part of the model.
      const float angle = static_cast<float>(positions[row]) * inverse_frequencies[i];
      cos_[row * half_ + i] = std::cos(angle);
      sin_[row * half_ + i] = std::sin(angle);
    }
  }
}

void RopeTable::Rotate(size_t row, float* data, uint32_t heads) const {
  const float* cos = cos_.data() + row * half_;
  const float* sin = sin_.data() + row * half_;
  for (uint32_t head = 0; head < heads; ++head, data += 2 * half_) {
    for (size_t i = 0; i < half_; ++i) {
      const float a = data[i];
      const float b = data[i + half_];
      data[i] = a * cos[i] - b * sin[i];
      data[i + half_] = b * cos[i] + a * sin[i];
    }
  }
}

}  // namespace kvrelay::engine
