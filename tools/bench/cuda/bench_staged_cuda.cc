// The two stages of a packed stream where a GPU has the KV: chunks packed into pinned memory of the
// host, every second slice of shuffled blocks, and unpacked from there, by one rail (a thread that
// has four chunks in work) and by two; against one copy of the copy engine to or from pinned memory
// of the same size. From the first call until the host sees the last end. The first of every case
// is checked byte by byte.
//
// usage: bench_staged_cuda [--json=FILE] [--rounds=N]
#include <sys/mman.h>

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <fstream>
#include <memory>
#include <nlohmann/json.hpp>
#include <numeric>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "attention/cuda/device_array.h"
#include "base/clock.h"
#include "base/mapping.h"
#include "kvcache/cuda/device_cuda.h"
#include "tools/bench/must.h"
#include "tools/bench/spread.h"

namespace kvrelay::bench {
namespace {

using std::chrono::steady_clock;

constexpr uint64_t kBytes = 64 << 20;  // of a request, one head of two
constexpr uint32_t kRows = 16;         // slices of a block, at most
constexpr uint64_t kLargestBlock = 128 << 10;
constexpr size_t kSlots = 8;   // of a rail
constexpr size_t kAtOnce = 4;  // of them, for one reader

double UsSince(TimePoint begin) {
  return std::chrono::duration<double, std::micro>(steady_clock::now() - begin).count();
}

class Stages {
 public:
  explicit Stages(int rounds)
      : rounds_(rounds),
        device_(Must(cuda::OpenDevice(0))),
        kv_(Must(device_->Allocate(2 * kBytes, "bench-staged"))),
        host_(Must(Mapping::Map(kBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1))),
        pinned_(Must(device_->Pin({host_.data(), kBytes}, HostAccess::kReadWrite))) {
    KVRELAY_CUDA(cudaStreamCreateWithFlags(&stream_, cudaStreamNonBlocking));
  }
  ~Stages() { cudaStreamDestroy(stream_); }

  // Of packing (or unpacking) all of it in chunks, and of one copy.
  nlohmann::ordered_json Measure(bool pack, uint64_t slice, uint64_t chunk, size_t rails) {
    const uint32_t rows = static_cast<uint32_t>(
        std::max<uint64_t>(1, std::min<uint64_t>(kRows, kLargestBlock / slice)));
    const uint64_t block = slice * rows;
    std::vector<uint64_t> places(kBytes / block);
    std::iota(places.begin(), places.end(), 0);
    std::ranges::shuffle(places, std::mt19937(1));
    std::vector<CopyPlan> plans;
    for (uint64_t first = 0; first < kBytes; first += chunk) {
      plans.push_back(
          PlanOf(pack, slice, rows, std::span(places).subspan(first / block, chunk / block)));
    }
    std::vector<double> us;
    std::vector<double> copy_us;
    for (int round = -1; round < rounds_; ++round) {
      if (round == -1) Prepare(pack);
      const auto begin = steady_clock::now();
      std::vector<std::thread> others;
      for (size_t rail = 1; rail < rails; ++rail) {
        others.emplace_back([&, rail] { MoveShare(pack, plans, chunk, rail, rails, round == -1); });
      }
      MoveShare(pack, plans, chunk, 0, rails, round == -1);
      for (std::thread& other : others) other.join();
      if (round == -1) {
        Verify(pack, slice, rows, places);
        continue;
      }
      us.push_back(UsSince(begin));
      const auto copy_begin = steady_clock::now();
      KVRELAY_CUDA(
          pack ? cudaMemcpyAsync(host_.data(), kv_.data(), kBytes, cudaMemcpyDefault, stream_)
               : cudaMemcpyAsync(kv_.data(), host_.data(), kBytes, cudaMemcpyDefault, stream_));
      KVRELAY_CUDA(cudaStreamSynchronize(stream_));
      copy_us.push_back(UsSince(copy_begin));
    }
    const Spread staged(us);
    const Spread copy(copy_us);
    const auto rate = [](double took) { return static_cast<double>(kBytes) / took / 1e3; };
    std::printf(
        "%-6s slices %6llu chunks %8llu, %zu rails: %8.1f us %5.1f GB/s | copy %8.1f us %5.1f "
        "GB/s | ratio %.3f\n",
        pack ? "pack" : "unpack", static_cast<unsigned long long>(slice),
        static_cast<unsigned long long>(chunk), rails, staged.median, rate(staged.median),
        copy.median, rate(copy.median), copy.median / staged.median);
    std::fflush(stdout);
    return {{"stage", pack ? "pack" : "unpack"},
            {"slice", slice},
            {"chunk", chunk},
            {"rails", rails},
            {"bytes", kBytes},
            {"us", staged.json()},
            {"copy_us", copy.json()},
            {"ratio_of_medians", copy.median / staged.median}};
  }

 private:
  static CopyPlan PlanOf(bool pack, uint64_t slice, uint32_t rows,
                         std::span<const uint64_t> places) {
    CopyPlan plan;
    plan.boxes.resize(1);
    CopyBox& box = plan.boxes[0];
    box.run_bytes = slice;
    box.inner = pack ? CopyDim{rows, 2 * slice, slice} : CopyDim{rows, slice, 2 * slice};
    box.num_places = 1;
    box.num_segments = static_cast<uint32_t>(places.size());
    plan.places = {{0, 0, 0, 0}};
    for (uint64_t i = 0; i < places.size(); ++i) {
      const uint64_t there = places[i] * 2 * slice * rows;
      const uint64_t here = i * slice * rows;
      plan.segments.push_back(pack ? CopySegment{there, here} : CopySegment{here, there});
    }
    return plan;
  }
  // Every chunk of one rail, some of them at a time.
  void MoveShare(bool pack, const std::vector<CopyPlan>& plans, uint64_t chunk, size_t rail,
                 size_t rails, bool to_places_of_their_own) {
    std::deque<std::unique_ptr<DeviceCopy>> under_way;
    const auto wait = [&] {
      while (!under_way.front()->Ended()) {
      }
      under_way.pop_front();
    };
    for (size_t i = rail; i < plans.size(); i += rails) {
      if (under_way.size() == kAtOnce) wait();
      const size_t slot = to_places_of_their_own ? i : i % (rails * kSlots);
      std::byte* const at = host_.data() + slot * chunk;
      under_way.push_back(
          Must(pack ? device_->Copy(plans[i], std::vector<const std::byte*>{kv_.data()},
                                    std::vector<std::byte*>{at})
                    : device_->Copy(plans[i], std::vector<const std::byte*>{at},
                                    std::vector<std::byte*>{kv_.data()})));
    }
    while (!under_way.empty()) wait();
  }
  // Words that say where they lie in the source, and none in the destination.
  void Prepare(bool pack) {
    words_.resize((pack ? 2 : 1) * kBytes / 8);
    for (uint64_t i = 0; i < words_.size(); ++i) words_[i] = i * 0x9e3779b97f4a7c15ULL + 1;
    void* const source = pack ? kv_.data() : host_.data();
    KVRELAY_CUDA(cudaMemset(kv_.data(), 0x5a, 2 * kBytes));
    KVRELAY_CUDA(cudaMemset(host_.data(), 0x5a, kBytes));
    KVRELAY_CUDA(cudaMemcpy(source, words_.data(), words_.size() * 8, cudaMemcpyDefault));
    KVRELAY_CUDA(cudaDeviceSynchronize());
  }
  void Verify(bool pack, uint64_t slice, uint32_t rows, const std::vector<uint64_t>& places) {
    std::vector<std::byte> got((pack ? 1 : 2) * kBytes);
    KVRELAY_CUDA(
        cudaMemcpy(got.data(), pack ? host_.data() : kv_.data(), got.size(), cudaMemcpyDefault));
    const auto* const words = reinterpret_cast<const std::byte*>(words_.data());
    for (uint64_t i = 0; i < places.size() * rows; ++i) {
      const uint64_t there = (places[i / rows] * rows + i % rows) * 2 * slice;
      const uint64_t here = i * slice;
      const std::byte* const is = got.data() + (pack ? here : there);
      Check(std::memcmp(is, words + (pack ? there : here), slice) == 0, "wrong bytes");
      if (pack) continue;
      Check(is[slice] == std::byte{0x5a} && is[2 * slice - 1] == std::byte{0x5a}, "foreign bytes");
    }
  }

  const int rounds_;
  const std::shared_ptr<Device> device_;
  const Region kv_;
  const Mapping host_;
  const std::unique_ptr<PinnedHost> pinned_;
  cudaStream_t stream_ = nullptr;
  std::vector<uint64_t> words_;
};

int Main(int argc, char** argv) {
  std::string json_file;
  int rounds = 21;
  for (int i = 1; i < argc; ++i) {
    const std::string arg = argv[i];
    if (arg.starts_with("--json=")) {
      json_file = arg.substr(7);
    } else if (arg.starts_with("--rounds=")) {
      rounds = std::max(1, std::atoi(arg.c_str() + 9));
    } else {
      std::fprintf(stderr, "usage: bench_staged_cuda [--json=FILE] [--rounds=N]\n");
      return 2;
    }
  }
  int gpus = 0;
  if (cudaGetDeviceCount(&gpus) != cudaSuccess || gpus == 0) {
    std::printf("no GPU here: nothing to measure\n");
    return 0;
  }
  Stages stages(rounds);
  auto rows = nlohmann::ordered_json::array();
  for (const bool pack : {true, false}) {
    for (const size_t rails : {1, 2}) {
      for (const uint64_t chunk : {uint64_t{256} << 10, uint64_t{1} << 20}) {
        for (const uint64_t slice : {64, 256, 2 << 10, 16 << 10, 128 << 10}) {
          rows.push_back(stages.Measure(pack, slice, chunk, rails));
        }
      }
    }
  }
  if (json_file.empty()) return 0;
  std::ofstream file(json_file);
  file << nlohmann::ordered_json{{"benchmark", "staged_cuda"}, {"rounds", rounds}, {"rows", rows}}
              .dump(2)
       << "\n";
  Check(file.flush().good(), "cannot write " + json_file);
  return 0;
}

}  // namespace
}  // namespace kvrelay::bench

int main(int argc, char** argv) { return kvrelay::bench::Main(argc, argv); }
