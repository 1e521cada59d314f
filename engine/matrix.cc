#include "engine/matrix.h"

#include <cblas.h>

#include <algorithm>

#include "base/parallel.h"

namespace kvrelay::engine {
namespace {

// Outputs per BLAS call: wide enough for its kernels, narrow enough to keep all threads busy.
constexpr size_t kOutputsPerCall = 64;
// About 20 us of multiply-adds on one core.
constexpr size_t kWorkPerRange = 400'000;
// Rows per range where a bias is added.
constexpr size_t kBiasGrain = 16;

}  // namespace

void MultiplyTransposed(const Activations& x, const float* weights, size_t outputs, float* out,
                        size_t out_stride) {
  // BLAS's own threads would fight with ours. Once is enough, but the call costs nothing.
  openblas_set_num_threads(1);
  if (x.rows == 0) return;
  const size_t calls = (outputs + kOutputsPerCall - 1) / kOutputsPerCall;
  const size_t work_per_call = x.rows * x.columns * kOutputsPerCall;
  const size_t grain = std::max<size_t>(1, kWorkPerRange / work_per_call);
  ParallelFor(calls, grain, [&](size_t begin, size_t end) {
    for (size_t call = begin; call < end; ++call) {
      const size_t first = call * kOutputsPerCall;
      const size_t count = std::min(kOutputsPerCall, outputs - first);
      cblas_sgemm(CblasRowMajor, CblasNoTrans, CblasTrans, static_cast<blasint>(x.rows),
                  static_cast<blasint>(count), static_cast<blasint>(x.columns), 1.0F, x.first,
                  static_cast<blasint>(x.stride), weights + first * x.columns,
                  static_cast<blasint>(x.columns), 0.0F, out + first,
                  static_cast<blasint>(out_stride));
    }
  });
}

void Linear::Apply(const float* x, size_t rows, float* out) const {
  const size_t outputs = weights.rows;
  MultiplyTransposed({x, rows, weights.columns, weights.columns}, weights.values.data(), outputs,
                     out, outputs);
  if (bias.empty()) return;
  ParallelFor(rows, kBiasGrain, [&](size_t begin, size_t end) {
    for (size_t row = begin; row < end; ++row) {
      for (size_t o = 0; o < outputs; ++o) out[row * outputs + o] += bias[o];
    }
  });
}

}  // namespace kvrelay::engine
