// Dense fp32 arithmetic of the CPU engine: weights, and activations times weights.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

namespace kvrelay::engine {

// Row-major weights of a linear layer: rows = outputs, columns = inputs.
struct Matrix {
  size_t rows = 0;
  size_t columns = 0;
  std::vector<float> values;

  Matrix() = default;
  Matrix(size_t rows, size_t columns) : rows(rows), columns(columns), values(rows * columns) {}
  std::span<float> Rows(size_t first, size_t count) {
    return std::span(values).subspan(first * columns, count * columns);
  }
  const float* Row(size_t index) const { return values.data() + index * columns; }
};

// A linear layer: y = x * weights^T + bias.
struct Linear {
  Matrix weights;
  std::vector<float> bias;  // one per output, or none at all

  Linear() = default;
  Linear(size_t outputs, size_t inputs, bool with_bias)
      : weights(outputs, inputs), bias(with_bias ? outputs : 0) {}
  // `rows` rows of x into as many of `out`, both without gaps. As MultiplyTransposed.
  void Apply(const float* x, size_t rows, float* out) const;
};

// Rows of activations, `stride` apart.
struct Activations {
  const float* first = nullptr;
  size_t rows = 0;
  size_t columns = 0;
  size_t stride = 0;
};

// out[i][o] = sum over k of x[i][k] * weights[o][k], for rows of out `out_stride` apart. `weights`
// points to `outputs` rows. Threaded by ParallelFor over fixed groups of outputs, so that how many
// threads there are changes no bit; how many rows there are may change the last bits (BLAS picks
// its kernel by shape).
void MultiplyTransposed(const Activations& x, const float* weights, size_t outputs, float* out,
                        size_t out_stride);

}  // namespace kvrelay::engine
