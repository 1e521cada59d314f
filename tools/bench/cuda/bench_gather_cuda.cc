// The gather kernel: one of two heads' slices of every token, blocks shuffled, out of this GPU's
// memory and, where there is a second one with peer access, out of its memory; copied as they are,
// and cast from bf16 to fp8 (rates are of the source's bytes). Beside it one
// contiguous copy of the same size, a copy per slice, and a batch of such copies. Events on the
// stream around each; before each a flush that leaves this GPU's L2 cold.
//
// usage: bench_gather_cuda [--json=FILE] [--iterations=N]
#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <functional>
#include <nlohmann/json.hpp>
#include <numeric>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "attention/cuda/device_array.h"
#include "kvcache/cuda/gather_cuda.h"
#include "tools/bench/cuda/flush.h"
#include "tools/bench/spread.h"

namespace kvrelay::bench {
namespace {

using attention::cuda::DeviceArray;
using cuda::GatherCuda;

constexpr uint64_t kMiB = 1 << 20;
constexpr uint32_t kPlaces = 32;  // K and V of 16 layers
constexpr uint32_t kBlockTokens = 16;
// Copies that are launched one by one: enough to see their rate.
constexpr size_t kMostCopies = 4096;
constexpr size_t kMostBatched = 32768;

// us between events around what `enqueue` puts on a stream of the highest priority.
class Timer {
 public:
  explicit Timer(int iterations) : iterations_(iterations) {
    int least = 0;
    int greatest = 0;
    KVRELAY_CUDA(cudaDeviceGetStreamPriorityRange(&least, &greatest));
    KVRELAY_CUDA(cudaStreamCreateWithPriority(&stream_, cudaStreamNonBlocking, greatest));
    KVRELAY_CUDA(cudaEventCreate(&begin_));
    KVRELAY_CUDA(cudaEventCreate(&end_));
  }
  cudaStream_t stream() const { return stream_; }
  Spread Measure(const std::function<void(cudaStream_t)>& enqueue) {
    std::vector<double> us;
    for (int i = -2; i < iterations_; ++i) {
      flush_.Enqueue(stream_);
      KVRELAY_CUDA(cudaEventRecord(begin_, stream_));
      enqueue(stream_);
      KVRELAY_CUDA(cudaEventRecord(end_, stream_));
      KVRELAY_CUDA(cudaEventSynchronize(end_));
      float ms = 0;
      KVRELAY_CUDA(cudaEventElapsedTime(&ms, begin_, end_));
      if (i >= 0) us.push_back(ms * 1e3);
    }
    return Spread(std::move(us));
  }

 private:
  const int iterations_;
  Flush flush_;
  cudaStream_t stream_ = nullptr;
  cudaEvent_t begin_ = nullptr;
  cudaEvent_t end_ = nullptr;
};

// Slices of `slice` bytes, every second one of the source, `bytes` in all; cast: from bf16 to
// fp8_e4m3.
CopyPlan PlanOf(uint64_t slice, uint64_t bytes, bool casts = false) {
  const uint64_t block = slice * kBlockTokens;
  const uint64_t blocks = bytes / kPlaces / block;
  std::vector<uint64_t> from(blocks);
  std::vector<uint64_t> to(blocks);
  std::iota(from.begin(), from.end(), 0);
  std::iota(to.begin(), to.end(), 0);
  std::shuffle(from.begin(), from.end(), std::mt19937(1));
  std::shuffle(to.begin(), to.end(), std::mt19937(2));
  CopyPlan plan;
  for (uint64_t i = 0; i < blocks; ++i)
    plan.segments.push_back({from[i] * block * 2, to[i] * block});
  for (uint64_t i = 0; i < kPlaces; ++i) {
    plan.places.push_back({0, 0, i * blocks * block * 2, i * blocks * block});
  }
  CopyBox box;
  box.num_places = kPlaces;
  box.num_segments = static_cast<uint32_t>(blocks);
  box.inner = {kBlockTokens, slice * 2, slice};
  box.run_bytes = slice;
  if (casts) {
    plan.factors = {0.37F};
    box.casts = true;
    box.cast = {DType::kBf16, DType::kFp8E4m3};
    box.run_bytes = slice / 2;
    box.inner.dst_stride = slice / 2;
  }
  plan.boxes.push_back(box);
  return plan;
}

struct Slices {
  std::vector<const void*> from;
  std::vector<void*> to;
};
Slices FirstSlices(const CopyPlan& plan, const std::byte* src, std::byte* dst, size_t most) {
  Slices slices;
  ForEachRun(plan, [&](const CopyBox&, const PlanRun& run) {
    if (slices.from.size() == most) return;
    slices.from.push_back(src + run.src);
    slices.to.push_back(dst + run.dst);
  });
  return slices;
}

// GB/s beside the times.
nlohmann::json Rate(const Spread& us, double bytes) {
  return {{"min_us", us.min},
          {"median_us", us.median},
          {"max_us", us.max},
          {"bytes", bytes},
          {"gb_per_s", bytes / us.median / 1e3}};
}

void Ok(const Status& status) {
  if (status.ok()) return;
  std::fprintf(stderr, "%s\n", status.ToString().c_str());
  std::exit(1);
}

nlohmann::json Batched(Timer& timer, const Slices& slices, uint64_t slice) {
#if CUDART_VERSION >= 13000
  std::vector<size_t> sizes(slices.from.size(), slice);
  cudaMemcpyAttributes attributes = {};
  attributes.srcAccessOrder = cudaMemcpySrcAccessOrderStream;
  size_t first = 0;
  const Spread us = timer.Measure([&](cudaStream_t stream) {
    KVRELAY_CUDA(cudaMemcpyBatchAsync(slices.to.data(), slices.from.data(), sizes.data(),
                                      sizes.size(), &attributes, &first, 1, stream));
  });
  return Rate(us, static_cast<double>(slices.from.size() * slice));
#else
  static_cast<void>(timer);
  static_cast<void>(slices);
  static_cast<void>(slice);
  return nullptr;
#endif
}

// Appends the rate in bytes of the source; returns the median.
double AddGather(Timer& timer, const CopyPlan& plan, const std::byte* src, std::byte* dst,
                 uint32_t sms, nlohmann::json& row) {
  const std::byte* const from[] = {src};
  std::byte* const to[] = {dst};
  auto gather = GatherCuda::Make(plan, from, to, {sms});
  if (!gather) Ok(gather.error());
  const DeviceArray<std::byte> tables(gather->table_bytes());
  Ok(gather->Upload(tables.get(), timer.stream()));
  const Spread us = timer.Measure([&](cudaStream_t stream) { Ok(gather->Launch(stream)); });
  nlohmann::json entry = Rate(us, static_cast<double>(plan.src_bytes()));
  entry["sms"] = sms;
  entry["of_contiguous"] =
      entry["gb_per_s"].get<double>() / row["contiguous"]["gb_per_s"].get<double>();
  row[plan.boxes[0].casts ? "gather_cast" : "gather"].push_back(entry);
  return us.median;
}

// All slice sizes from one source; a table row each.
nlohmann::json Measure(Timer& timer, const std::string& name, const std::byte* src,
                       std::byte* dst) {
  nlohmann::json rows = nlohmann::json::array();
  for (const uint64_t bytes : {64 * kMiB, 256 * kMiB}) {
    const Spread whole = timer.Measure([&](cudaStream_t stream) {
      KVRELAY_CUDA(cudaMemcpyAsync(dst, src, bytes, cudaMemcpyDeviceToDevice, stream));
    });
    for (const uint64_t slice : {256, 1024, 4096, 16384, 65536}) {
      const CopyPlan plan = PlanOf(slice, bytes);
      nlohmann::json row = {{"source", name},
                            {"slice", slice},
                            {"bytes", bytes},
                            {"contiguous", Rate(whole, static_cast<double>(bytes))}};
      std::printf("%-5s %4lu MiB of %6lu B | one copy %6.1f |", name.c_str(), bytes / kMiB, slice,
                  static_cast<double>(bytes) / whole.median / 1e3);
      for (const bool casts : {false, true}) {
        for (const uint32_t sms : {8, 16, 32, 64}) {
          const double us = AddGather(timer, PlanOf(slice, bytes, casts), src, dst, sms, row);
          if (!casts) std::printf(" %6.1f", static_cast<double>(bytes) / us / 1e3);
          std::printf(" %4.2f", whole.median / us);
        }
        std::printf(" |");
      }
      const Slices few = FirstSlices(plan, src, dst, kMostCopies);
      const Spread single = timer.Measure([&](cudaStream_t stream) {
        for (size_t i = 0; i < few.from.size(); ++i) {
          KVRELAY_CUDA(
              cudaMemcpyAsync(few.to[i], few.from[i], slice, cudaMemcpyDeviceToDevice, stream));
        }
      });
      row["copy_per_slice"] = Rate(single, static_cast<double>(few.from.size() * slice));
      row["batch"] = Batched(timer, FirstSlices(plan, src, dst, kMostBatched), slice);
      const double batch = row["batch"].is_null() ? 0 : row["batch"]["gb_per_s"].get<double>();
      std::printf(" %6.2f | %6.1f\n", row["copy_per_slice"]["gb_per_s"].get<double>(), batch);
      std::fflush(stdout);
      rows.push_back(row);
    }
  }
  return rows;
}

int Run(int argc, char** argv) {
  int iterations = 15;
  std::string json_file;
  for (int i = 1; i < argc; ++i) {
    const std::string arg = argv[i];
    if (arg.starts_with("--json=")) {
      json_file = arg.substr(7);
    } else if (arg.starts_with("--iterations=")) {
      iterations = std::max(1, std::atoi(arg.c_str() + 13));
    } else {
      std::fprintf(stderr, "bench_gather_cuda: unknown argument %s\n", arg.c_str());
      return 2;
    }
  }
  int devices = 0;
  if (const cudaError_t error = cudaGetDeviceCount(&devices);
      error != cudaSuccess || devices == 0) {
    std::fprintf(stderr, "skipped: no CUDA device: %s\n", cudaGetErrorString(error));
    return 0;
  }
  int peer = 0;
  if (devices > 1) KVRELAY_CUDA(cudaDeviceCanAccessPeer(&peer, 0, 1));
  KVRELAY_CUDA(cudaSetDevice(0));
  Timer timer(iterations);
  constexpr uint64_t kMost = 256 * kMiB;
  DeviceArray<std::byte> dst(kMost);
  DeviceArray<std::byte> src(2 * kMost);
  FillRandom(src.get(), kMost, true, 1);
  KVRELAY_CUDA(cudaDeviceSynchronize());
  std::printf(
      "GB/s, gather also as part of one copy's | one copy | 8, 16, 32, 64 SMs | cast, same SMs | "
      "copy per "
      "slice | batch\n");
  nlohmann::json report = {{"schema", 1}, {"iterations", iterations}};
  report["rows"] = Measure(timer, "local", src.get(), dst.get());
  if (peer != 0) {
    KVRELAY_CUDA(cudaDeviceEnablePeerAccess(1, 0));
    KVRELAY_CUDA(cudaSetDevice(1));
    const DeviceArray<std::byte> remote(2 * kMost);
    FillRandom(remote.get(), kMost, true, 2);
    KVRELAY_CUDA(cudaDeviceSynchronize());
    KVRELAY_CUDA(cudaSetDevice(0));
    for (auto& row : Measure(timer, "peer", remote.get(), dst.get())) {
      report["rows"].push_back(row);
    }
  } else {
    std::printf("no second GPU with peer access: nothing measured from a peer\n");
  }
  if (!json_file.empty()) std::ofstream(json_file) << report.dump(1) << "\n";
  return 0;
}

}  // namespace
}  // namespace kvrelay::bench

int main(int argc, char** argv) { return kvrelay::bench::Run(argc, argv); }
