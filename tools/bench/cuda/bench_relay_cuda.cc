// Relay attention on the GPU: one decode step of one layer. CUDA graph replays, each after a flush
// that leaves L2 cold and clean; median. The floor is each distinct byte of K and V once at
// 4.3 TB/s, or the floating-point operations at 790 TFLOP/s, whichever takes longer.
//
// usage: bench_relay_cuda [--json=FILE] [--iterations=N] [--only=PREFIX,REQUESTS,OWN]
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

#include "attention/cuda/device_array.h"
#include "attention/cuda/relay_cuda.h"
#include "tools/bench/cuda/flush.h"
#include "tools/bench/cuda/graph_timer.h"

namespace kvrelay::bench {
namespace {

using attention::cuda::DeviceArray;
using attention::cuda::LayerCache;
using attention::cuda::LayerMaps;
using attention::cuda::RelayKernels;
using attention::cuda::RelayMode;
using attention::cuda::RelayShape;
using attention::cuda::StepBatch;

constexpr double kBytesPerUs = 4.3e6;
constexpr double kFlopsPerUs = 790e6;
constexpr uint32_t kQueryHeads = 32;
constexpr uint32_t kKvHeads = 8;
constexpr uint32_t kHeadDim = 128;
constexpr uint32_t kBlockSize = 16;

struct Step {
  uint32_t prefix;
  uint32_t requests;
  uint32_t own;
};

struct Floor {
  double us;
  double bytes;
  double flops;
};

Floor FloorOf(const Step& step) {
  const double token = 2.0 * kKvHeads * kHeadDim * 2;
  const double row = 2.0 * kQueryHeads * kHeadDim * 2;  // Q and O
  const double bytes =
      (step.prefix + double{1} * step.requests * step.own) * token + step.requests * row;
  const double flops =
      4.0 * kQueryHeads * kHeadDim * step.requests * (double{1} * step.prefix + step.own);
  return {std::max(bytes / kBytesPerUs, flops / kFlopsPerUs), bytes, flops};
}

void Ok(const Status& status) {
  if (status.ok()) return;
  std::fprintf(stderr, "%s\n", status.ToString().c_str());
  std::exit(1);
}

// The step's cache and tables on the device, blocks shuffled.
class StepOnDevice {
 public:
  StepOnDevice(const RelayKernels& kernels, const Step& step, uint16_t* k, uint16_t* v,
               const uint16_t* q, uint16_t* out, float* lse, void* workspace)
      : kernels_(kernels),
        q_(q),
        out_(out),
        lse_(lse),
        workspace_(workspace),
        contexts_(std::vector<uint32_t>(step.requests, step.prefix + step.own)),
        prefixes_(std::vector<uint32_t>(step.requests, 0)),
        prefix_tokens_(std::vector<uint32_t>{step.prefix}),
        blocks_(std::max<size_t>(1, Blocks(step.own) * step.requests)),
        prefix_blocks_(std::max<size_t>(1, Blocks(step.prefix))) {
    std::vector<uint32_t> ids(Blocks(step.own) * step.requests + Blocks(step.prefix));
    std::iota(ids.begin(), ids.end(), 0);
    std::shuffle(ids.begin(), ids.end(), std::mt19937(1));
    prefix_blocks_.Upload({ids.begin(), ids.begin() + Blocks(step.prefix)});
    blocks_.Upload({ids.begin() + Blocks(step.prefix), ids.end()});
    batch_ = {contexts_.get(),      prefixes_.get(),      blocks_.get(),      Blocks(step.own),
              prefix_tokens_.get(), prefix_blocks_.get(), Blocks(step.prefix)};
    LayerCache cache;
    cache.k = k;
    cache.v = v;
    cache.num_blocks = std::max<uint32_t>(1, ids.size());
    cache.token_stride = kHeadDim * 2;
    cache.head_stride = cache.token_stride * kBlockSize;
    cache.block_stride = cache.head_stride * kKvHeads;
    const auto maps = kernels.MapLayer(cache);
    if (!maps) Ok(maps.error());
    maps_ = *maps;
  }

  void Schedule(RelayMode mode, cudaStream_t stream) const {
    Ok(kernels_.Schedule(batch_, mode, workspace_, stream));
  }
  void Attend(cudaStream_t stream) const {
    Ok(kernels_.Attend(maps_, batch_, q_, out_, lse_, workspace_, stream));
  }

 private:
  static uint32_t Blocks(uint32_t tokens) { return (tokens + kBlockSize - 1) / kBlockSize; }

  const RelayKernels& kernels_;
  const uint16_t* q_;
  uint16_t* out_;
  float* lse_;
  void* workspace_;
  DeviceArray<uint32_t> contexts_, prefixes_, prefix_tokens_, blocks_, prefix_blocks_;
  StepBatch batch_;
  LayerMaps maps_;
};

int Run(int argc, char** argv) {
  int iterations = 30;
  std::string json_file;
  std::vector<Step> steps;
  for (int i = 1; i < argc; ++i) {
    const std::string arg = argv[i];
    Step step = {};
    if (arg.starts_with("--json=")) {
      json_file = arg.substr(7);
    } else if (arg.starts_with("--iterations=")) {
      iterations = std::max(1, std::atoi(arg.c_str() + 13));
    } else if (std::sscanf(arg.c_str(), "--only=%u,%u,%u", &step.prefix, &step.requests,
                           &step.own) == 3) {
      steps.push_back(step);
    } else {
      std::fprintf(stderr, "bench_relay_cuda: unknown argument %s\n", arg.c_str());
      return 2;
    }
  }
  if (const Status usable = attention::cuda::DeviceUsable(); !usable.ok()) {
    std::fprintf(stderr, "skipped: %s\n", usable.message().c_str());
    return 0;
  }
  if (steps.empty()) {
    for (const uint32_t requests : {64, 128, 256}) {
      for (const uint32_t own : {128, 512}) steps.push_back({0, requests, own});  // suffix alone
    }
    for (const uint32_t requests : {8, 32, 64, 256}) steps.push_back({8192, requests, 0});
    for (const uint32_t prefix : {512, 2048, 8192}) {
      for (const uint32_t requests : {1, 8, 32, 64, 128, 256}) {
        for (const uint32_t own : {128, 512}) steps.push_back({prefix, requests, own});
      }
    }
  }
  size_t blocks = 1;
  uint32_t most = 1;
  for (const Step& step : steps) {
    blocks = std::max<size_t>(
        blocks, step.prefix / kBlockSize + size_t{step.requests} * (step.own / kBlockSize + 1));
    most = std::max(most, step.requests);
  }
  const size_t elements = blocks * kBlockSize * kKvHeads * kHeadDim;
  DeviceArray<uint16_t> k(elements);
  DeviceArray<uint16_t> v(elements);
  DeviceArray<uint16_t> q(size_t{most} * kQueryHeads * kHeadDim);
  DeviceArray<uint16_t> out(q.count());
  DeviceArray<float> lse(size_t{most} * kQueryHeads);
  FillRandom(k.get(), elements, true, 1);
  FillRandom(v.get(), elements, true, 2);
  FillRandom(q.get(), q.count(), true, 3);

  GraphTimer timer(iterations);
  nlohmann::json report = {{"schema", 1},
                           {"query_heads", kQueryHeads},
                           {"kv_heads", kKvHeads},
                           {"head_size", kHeadDim},
                           {"block_size", kBlockSize},
                           {"dtype", "bf16"},
                           {"iterations", iterations},
                           {"steps", nlohmann::json::array()}};
  const Spread empty = timer.Measure(Nothing);
  report["empty_kernel_us"] = empty.median;
  std::printf("empty kernel %.1f us\n", empty.median);
  std::printf("%6s %5s %5s | %8s | %9s %6s | %8s %8s | %8s | %7s %7s\n", "prefix", "reqs", "own",
              "floor us", "auto us", "share", "relay us", "paged us", "plan us", "TB/s", "TFLOP/s");
  for (const Step& step : steps) {
    RelayShape shape;
    shape.query_heads = kQueryHeads;
    shape.kv_heads = kKvHeads;
    shape.head_dim = kHeadDim;
    shape.block_size = kBlockSize;
    shape.max_requests = step.requests;
    shape.max_prefixes = 1;
    shape.scale = 1.0F / std::sqrt(float{kHeadDim});
    const auto kernels = RelayKernels::Create(shape);
    if (!kernels) Ok(kernels.error());
    const DeviceArray<uint8_t> workspace(kernels->workspace_bytes());
    const StepOnDevice on_device(*kernels, step, k.get(), v.get(), q.get(), out.get(), lse.get(),
                                 workspace.get());
    const auto measure = [&](RelayMode mode) {
      on_device.Schedule(mode, nullptr);
      KVRELAY_CUDA(cudaDeviceSynchronize());
      return timer.Measure([&](cudaStream_t stream) { on_device.Attend(stream); });
    };
    const Spread relay = measure(RelayMode::kAlways);
    const Spread paged = step.prefix == 0 ? relay : measure(RelayMode::kNever);
    const Spread chosen = step.prefix == 0 ? relay : measure(RelayMode::kAuto);
    const Spread plan =
        timer.Measure([&](cudaStream_t stream) { on_device.Schedule(RelayMode::kAuto, stream); });
    const Floor floor = FloorOf(step);
    std::printf("%6u %5u %5u | %8.1f | %9.1f %6.2f | %8.1f %8.1f | %8.1f | %7.2f %7.0f\n",
                step.prefix, step.requests, step.own, floor.us, chosen.median,
                floor.us / chosen.median, relay.median, paged.median, plan.median,
                floor.bytes / chosen.median / 1e6, floor.flops / chosen.median / 1e6);
    std::fflush(stdout);
    report["steps"].push_back({{"prefix_len", step.prefix},
                               {"num_reqs", step.requests},
                               {"context_len", step.own},
                               {"floor_us", floor.us},
                               {"bytes", floor.bytes},
                               {"flops", floor.flops},
                               {"auto", chosen.json_us()},
                               {"relay", relay.json_us()},
                               {"paged_shared", paged.json_us()},
                               {"schedule", plan.json_us()}});
  }
  if (!json_file.empty()) std::ofstream(json_file) << report.dump(1) << "\n";
  return 0;
}

}  // namespace
}  // namespace kvrelay::bench

int main(int argc, char** argv) { return kvrelay::bench::Run(argc, argv); }
