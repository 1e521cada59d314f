// Paged attention on the portable kernels: one layer of a step. CUDA graph replays, each after a
// flush that leaves L2 cold and clean. The floor is each byte of K, V, Q and O once at 4.3 TB/s, or
// the floating-point operations that rows see at 790 TFLOP/s, whichever takes longer (an H200's).
//
// usage: bench_paged_cuda [--json=FILE] [--iterations=N] [--only=STEP,SEQUENCES,ROWS]
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <nlohmann/json.hpp>
#include <numeric>
#include <random>
#include <string>
#include <vector>

#include "attention/cuda/paged_cuda.h"
#include "tools/bench/cuda/graph_timer.h"

namespace kvrelay::bench {
namespace {

using attention::cuda::DeviceArray;
using attention::cuda::PagedBatch;
using attention::cuda::PagedKernels;
using attention::cuda::PagedLayer;
using attention::cuda::PagedShape;

constexpr double kBytesPerUs = 4.3e6;
constexpr double kFlopsPerUs = 790e6;
constexpr uint32_t kBlockSize = 16;

struct PagedStep {
  const char* name;
  uint32_t sequences;
  uint32_t rows;  // of each
  uint32_t context;
  uint32_t query_heads = 32;
  uint32_t kv_heads = 8;
  uint32_t head_dim = 128;
  DType cache_dtype = DType::kBf16;
  uint32_t value_dim = 0;  // not 0: MLA
};

struct Cost {
  double bytes;
  double flops;
  double floor_us() const { return std::max(bytes / kBytesPerUs, flops / kFlopsPerUs); }
};

Cost CostOf(const PagedStep& step) {
  const bool mla = step.value_dim != 0;
  const double columns = step.head_dim + double{1} * (mla ? step.value_dim : step.head_dim);
  const double token =
      double{1} * step.kv_heads * step.head_dim * SizeOf(step.cache_dtype) * (mla ? 1 : 2);
  const double rows = double{1} * step.sequences * step.rows;
  // Row i of a sequence sees context - rows + i + 1 keys.
  const double seen = step.context - (step.rows - 1) / 2.0;
  return {step.sequences * (step.context * token) + rows * step.query_heads * columns * 2,
          2 * rows * seen * step.query_heads * columns};
}

void Must(const Status& status) {
  if (status.ok()) return;
  std::fprintf(stderr, "%s\n", status.ToString().c_str());
  std::exit(1);
}

std::vector<PagedStep> Steps() {
  std::vector<PagedStep> steps = {
      {"decode", 1, 1, 8192},     {"decode", 1, 1, 65536},     {"decode", 8, 1, 2048},
      {"decode", 16, 1, 8192},    {"decode", 64, 1, 2048},     {"decode", 256, 1, 1024},
      {"decode", 64, 1, 512},     {"verify", 64, 4, 2048},     {"prefill", 1, 2048, 2048},
      {"prefill", 1, 8192, 8192}, {"prefill", 1, 2048, 16384}, {"prefill", 8, 1024, 1024},
  };
  for (const DType dtype : {DType::kFp8E4m3, DType::kFp8E5m2, DType::kInt8}) {
    steps.push_back({"decode", 64, 1, 2048, 32, 8, 128, dtype});
    steps.push_back({"prefill", 1, 8192, 8192, 32, 8, 128, dtype});
  }
  for (const uint32_t head_dim : {64, 80, 96, 192, 256}) {
    steps.push_back({"decode", 64, 1, 2048, 32, 8, head_dim});
    steps.push_back({"prefill", 1, 4096, 4096, 32, 8, head_dim});
  }
  for (const uint32_t heads : {16, 128}) {
    steps.push_back({"mla", 64, 1, 2048, heads, 1, 576, DType::kBf16, 512});
  }
  return steps;
}

int RunPaged(int argc, char** argv) {
  int iterations = 20;
  std::string json_file;
  std::string only;
  for (int i = 1; i < argc; ++i) {
    const std::string arg = argv[i];
    if (arg.starts_with("--json=")) {
      json_file = arg.substr(7);
    } else if (arg.starts_with("--iterations=")) {
      iterations = std::max(1, std::atoi(arg.c_str() + 13));
    } else if (arg.starts_with("--only=")) {
      only = arg.substr(7);
    } else {
      std::fprintf(stderr, "bench_paged_cuda: unknown argument %s\n", arg.c_str());
      return 2;
    }
  }
  if (const Status usable = attention::cuda::PagedDeviceUsable(); !usable.ok()) {
    std::fprintf(stderr, "skipped: %s\n", usable.message().c_str());
    return 0;
  }
  GraphTimer timer(iterations);
  nlohmann::json report = {
      {"schema", 1}, {"iterations", iterations}, {"steps", nlohmann::json::array()}};
  std::printf("%-8s %-8s %4s %5s %6s %7s %4s | %8s | %8s %8s %8s %6s | %7s | %7s %7s\n", "step",
              "cache", "seqs", "rows", "ctx", "heads", "dim", "floor us", "min", "median", "max",
              "share", "plan us", "TB/s", "TFLOP/s");
  for (const PagedStep& step : Steps()) {
    const std::string what = std::string(step.name) + "," + std::to_string(step.sequences) + "," +
                             std::to_string(step.rows);
    if (!only.empty() && only != what) continue;
    PagedShape shape;
    shape.query_heads = step.query_heads;
    shape.kv_heads = step.kv_heads;
    shape.head_dim = step.head_dim;
    shape.value_dim = step.value_dim;
    shape.cache_dtype = step.cache_dtype;
    shape.block_size = kBlockSize;
    shape.max_sequences = step.sequences;
    shape.max_rows = step.sequences * step.rows;
    shape.scale = 1.0F / std::sqrt(static_cast<float>(step.head_dim));
    const Result<PagedKernels> kernels = PagedKernels::Create(shape);
    if (!kernels) Must(kernels.error());

    const uint32_t sequence_blocks = (step.context + kBlockSize - 1) / kBlockSize;
    std::vector<uint32_t> blocks(size_t{sequence_blocks} * step.sequences);
    std::iota(blocks.begin(), blocks.end(), 0);
    std::shuffle(blocks.begin(), blocks.end(), std::mt19937(1));
    std::vector<uint32_t> first_rows(step.sequences + 1);
    for (uint32_t s = 0; s <= step.sequences; ++s) first_rows[s] = s * step.rows;
    const DeviceArray<uint32_t> device_blocks(blocks);
    const DeviceArray<uint32_t> device_first_rows(first_rows);
    const DeviceArray<uint32_t> contexts(std::vector<uint32_t>(step.sequences, step.context));
    const uint64_t token = uint64_t{step.head_dim} * SizeOf(step.cache_dtype);
    const uint64_t bytes = blocks.size() * kBlockSize * step.kv_heads * token;
    const uint64_t row_elements = uint64_t{shape.max_rows} * step.query_heads * step.head_dim;
    const DeviceArray<std::byte> k(bytes);
    const DeviceArray<std::byte> v(step.value_dim == 0 ? bytes : 0);
    const DeviceArray<uint16_t> q(row_elements);
    const DeviceArray<uint16_t> out(row_elements);
    const DeviceArray<float> lse(size_t{shape.max_rows} * step.query_heads);
    const DeviceArray<std::byte> workspace(kernels->workspace_bytes());
    // As 8-bit numbers these are some numbers, too.
    FillRandom(k.get(), bytes / 2, true, 1);
    FillRandom(v.get(), v.count() / 2, true, 2);
    FillRandom(q.get(), row_elements, true, 3);

    PagedLayer layer;
    layer.cache.k = k.get();
    layer.cache.v = step.value_dim == 0 ? v.get() : nullptr;
    layer.cache.num_blocks = static_cast<uint32_t>(blocks.size());
    layer.cache.token_stride = token;
    layer.cache.head_stride = token * kBlockSize;
    layer.cache.block_stride = layer.cache.head_stride * step.kv_heads;
    PagedBatch batch;
    batch.requests.contexts = contexts.get();
    batch.requests.blocks = device_blocks.get();
    batch.requests.blocks_stride = sequence_blocks;
    batch.first_rows = device_first_rows.get();
    Must(kernels->Schedule(batch, workspace.get(), nullptr));
    KVRELAY_CUDA(cudaDeviceSynchronize());
    const Spread attend = timer.Measure([&](cudaStream_t stream) {
      Must(kernels->Attend(layer, batch, q.get(), out.get(), lse.get(), workspace.get(), stream));
    });
    const Spread plan = timer.Measure(
        [&](cudaStream_t stream) { Must(kernels->Schedule(batch, workspace.get(), stream)); });
    const Cost cost = CostOf(step);
    std::printf(
        "%-8s %-8s %4u %5u %6u %4u/%-2u %4u | %8.1f | %8.1f %8.1f %8.1f %6.2f | %7.1f | %7.2f "
        "%7.0f\n",
        step.name, std::string(DTypeName(step.cache_dtype)).c_str(), step.sequences, step.rows,
        step.context, step.query_heads, step.kv_heads, step.head_dim, cost.floor_us(), attend.min,
        attend.median, attend.max, cost.floor_us() / attend.median, plan.median,
        cost.bytes / attend.median / 1e6, cost.flops / attend.median / 1e6);
    std::fflush(stdout);
    report["steps"].push_back({{"step", step.name},
                               {"num_reqs", step.sequences},
                               {"rows", step.rows},
                               {"context_len", step.context},
                               {"query_heads", step.query_heads},
                               {"kv_heads", step.kv_heads},
                               {"head_size", step.head_dim},
                               {"cache_dtype", DTypeName(step.cache_dtype)},
                               {"floor_us", cost.floor_us()},
                               {"bytes", cost.bytes},
                               {"flops", cost.flops},
                               {"attend", attend.json_us()},
                               {"schedule", plan.json_us()}});
  }
  if (!json_file.empty()) std::ofstream(json_file) << report.dump(1) << "\n";
  return 0;
}

}  // namespace
}  // namespace kvrelay::bench

int main(int argc, char** argv) { return kvrelay::bench::RunPaged(argc, argv); }
