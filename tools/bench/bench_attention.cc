// Relay against paged attention on the CPU: one decode step of one layer, requests that share a
// prefix. Two floors: reading each distinct byte of K and V once, and what BLAS takes for the
// prefix's two matrix products in fp32. All are interleaved; layers rotate, so that caches are as
// cold as in a model. --context_len=0 measures the pass over the prefix alone.
#include <cblas.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <functional>
#include <memory>
#include <nlohmann/json.hpp>
#include <numeric>
#include <random>
#include <string>
#include <vector>

#include "attention/attention.h"
#include "attention/tile_kernel.h"
#include "base/parallel.h"
#include "tools/common/exit_code.h"
#include "tools/common/flags.h"
#include "tools/common/output.h"

namespace kvrelay::tools {
namespace {

struct Options {
  uint32_t num_reqs = 64;
  uint32_t prefix_len = 512;
  uint32_t context_len = 128;
  uint32_t num_query_heads = 32;
  uint32_t num_kv_heads = 8;
  uint32_t head_size = 128;
  uint32_t block_size = 16;
  std::string kv_dtype = "bf16";
  std::string kv_layout = "nhd";
  uint32_t layers = 4;
  uint32_t iterations = 30;
  uint32_t threads = 0;
  bool json = false;
};

Result<Action> ParseOptions(std::span<const std::string> args, Options& o, FlagSet& flags) {
  flags.Whole("num_reqs", &o.num_reqs, 1, 4096, "Requests that share the prefix.");
  flags.Whole("prefix_len", &o.prefix_len, 0, 1 << 20, "Tokens of the prefix, in whole blocks.");
  flags.Whole("context_len", &o.context_len, 0, 1 << 20, "Tokens of each request's own.");
  flags.Whole("num_query_heads", &o.num_query_heads, 1, 1024, "Query heads.");
  flags.Whole("num_kv_heads", &o.num_kv_heads, 1, 1024, "KV heads.");
  flags.Whole("head_size", &o.head_size, 1, 1024, "Elements of a head.");
  flags.Whole("block_size", &o.block_size, 1, 1024, "Tokens of a block.");
  flags.Choice("kv_dtype", &o.kv_dtype, {"fp32", "fp16", "bf16", "fp8_e4m3", "fp8_e5m2", "int8"},
               "Type of the cache.");
  flags.Choice("kv_layout", &o.kv_layout, {"nhd", "hnd"}, "Order inside a block.");
  flags.Whole("layers", &o.layers, 1, 64, "Layers to rotate over.");
  flags.Whole("iterations", &o.iterations, 1, 100000, "Times that each is measured.");
  flags.Whole("threads", &o.threads, 0, 1024, "Threads; 0: as many as there are processors.");
  flags.Switch("json", &o.json, "One JSON object.");
  return flags.Parse(args, ProcessEnvironment());
}

// One region of random K and V, one step of requests over it, and buffers for the results.
class Step {
 public:
  Step(const Options& o, DType dtype, KvFormat format)
      : prefix_blocks_(o.prefix_len / o.block_size),
        rows_(o.num_reqs * (o.num_query_heads / o.num_kv_heads)),
        own_blocks_((o.context_len + o.block_size - 1) / o.block_size),
        layout_(KvLayout::Dense(format, dtype, o.layers, o.num_kv_heads, o.head_size, o.block_size,
                                prefix_blocks_ + own_blocks_ * o.num_reqs)),
        memory_(std::make_unique_for_overwrite<std::byte[]>(layout_.dense_bytes())),
        kv_(layout_, {memory_.get()}),
        blocks_(layout_.num_blocks) {
    FillMemory(dtype);
    std::mt19937 random(1);
    std::iota(blocks_.begin(), blocks_.end(), 0);
    std::ranges::shuffle(blocks_, random);
    const std::span<const BlockId> all(blocks_);
    for (uint32_t i = 0; i < o.num_reqs; ++i) {
      sequences_.push_back({.first_row = i,
                            .rows = 1,
                            .context = prefix_blocks_ * o.block_size + o.context_len,
                            .prefix = all.first(prefix_blocks_),
                            .blocks = all.subspan(prefix_blocks_ + i * own_blocks_, own_blocks_)});
    }
    batch_ = {sequences_, o.num_query_heads, 1.0F / std::sqrt(static_cast<float>(o.head_size))};
    metadata_ = attention::PlanRelay(batch_, {});
    const size_t heads = size_t{o.num_reqs} * o.num_query_heads;
    std::normal_distribution<float> normal;
    q_.resize(heads * o.head_size);
    for (float& x : q_) x = normal(random);
    out_.resize(q_.size());
    gemm_out_.resize(q_.size());
    wide_.resize(prefix_tokens() * layout_.head_dim * layout_.kv_heads);
    for (float& x : wide_) x = normal(random);
    openblas_set_num_threads(1);
    lse_.resize(heads);
  }

  void Paged(uint32_t layer) { attention::PagedAttention(kv_, layer, batch_, q_, out_, lse_); }
  void Relay(uint32_t layer) {
    attention::RelayAttention(kv_, layer, batch_, metadata_, q_, out_, lse_);
  }
  // A layer's K and V, in a dense layout one contiguous run each.
  void Read(uint32_t layer) {
    const uint64_t bytes = layer_bytes() / 2;
    for (const TensorPlace& place : {layout_.k[layer], layout_.v[layer]}) {
      const std::byte* first = memory_.get() + place.offset;
      ParallelFor(bytes / kPiece, 1, [&](size_t begin, size_t end) {
        for (size_t piece = begin; piece < end; ++piece) ReadPiece(first + piece * kPiece);
      });
    }
  }
  // The prefix's products Q * K^T and P * V of all KV heads, on fp32 copies of K and V, each head
  // by one thread.
  void Gemm(uint32_t /*layer*/) {
    const auto rows = static_cast<blasint>(rows_);
    const auto keys = static_cast<blasint>(prefix_tokens());
    const auto dim = static_cast<blasint>(layout_.head_dim);
    ParallelFor(layout_.kv_heads, 1, [&](size_t begin, size_t end) {
      thread_local std::vector<float> scores;
      scores.resize(size_t{rows_} * prefix_tokens());
      for (size_t head = begin; head < end; ++head) {
        const size_t q = head * rows_ * layout_.head_dim;
        const float* const k = wide_.data() + head * prefix_tokens() * layout_.head_dim;
        cblas_sgemm(CblasRowMajor, CblasNoTrans, CblasTrans, rows, keys, dim, 1.0F, q_.data() + q,
                    dim, k, dim, 0.0F, scores.data(), keys);
        cblas_sgemm(CblasRowMajor, CblasNoTrans, CblasNoTrans, rows, dim, keys, 1.0F, scores.data(),
                    keys, k, dim, 0.0F, gemm_out_.data() + q, dim);
      }
    });
  }
  uint64_t prefix_flops() const {
    return uint64_t{4} * rows_ * prefix_tokens() * layout_.head_dim * layout_.kv_heads;
  }
  uint64_t layer_bytes() const { return layout_.dense_bytes() / layout_.layers(); }
  const std::vector<float>& out() const { return out_; }
  const attention::RelayDecision& decision() const { return metadata_.decision; }

 private:
  size_t prefix_tokens() const { return size_t{prefix_blocks_} * layout_.block_size; }
  static constexpr size_t kPiece = size_t{64} << 10;

  // Sign and fraction at random, exponents of about 1: as good as any numbers for a time.
  void FillMemory(DType dtype) {
    uint32_t state = 1;
    const auto fill = [&]<typename T>(T keep, T one) {
      for (size_t i = 0; i < layout_.dense_bytes(); i += sizeof(T)) {
        state = state * 1664525 + 1013904223;
        const auto random = static_cast<T>(state >> (32 - 8 * sizeof(T)));
        const auto element = static_cast<T>((random & keep) | one);
        std::memcpy(memory_.get() + i, &element, sizeof(T));
      }
    };
    if (dtype == DType::kFp32) fill(uint32_t{0x807FFFFF}, uint32_t{0x3F000000});
    if (dtype == DType::kFp16) fill(uint16_t{0x83FF}, uint16_t{0x3800});
    if (dtype == DType::kBf16) fill(uint16_t{0x807F}, uint16_t{0x3F00});
    if (dtype == DType::kFp8E4m3) fill(uint8_t{0x87}, uint8_t{0x30});
    if (dtype == DType::kFp8E5m2) fill(uint8_t{0x83}, uint8_t{0x38});
    if (dtype == DType::kInt8) fill(uint8_t{0x83}, uint8_t{0});
  }
  static void ReadPiece(const std::byte* piece) {
    uint64_t sums[8] = {};
    for (size_t i = 0; i < kPiece; i += sizeof(sums)) {
      uint64_t words[8];
      std::memcpy(words, piece + i, sizeof(words));
      for (int j = 0; j < 8; ++j) sums[j] += words[j];
    }
    volatile uint64_t sink = std::accumulate(std::begin(sums), std::end(sums), uint64_t{0});
    (void)sink;
  }

  uint32_t prefix_blocks_;
  uint32_t rows_;  // of queries that meet a KV head
  uint32_t own_blocks_;
  KvLayout layout_;
  std::unique_ptr<std::byte[]> memory_;
  KvView kv_;
  std::vector<BlockId> blocks_;
  std::vector<attention::Sequence> sequences_;
  attention::Batch batch_;
  attention::RelayMetadata metadata_;
  std::vector<float> q_;
  std::vector<float> out_;
  std::vector<float> lse_;
  std::vector<float> wide_;  // a prefix in fp32, KV head after KV head
  std::vector<float> gemm_out_;
};

struct Timing {
  std::string name;
  std::function<void(uint32_t layer)> run;
  std::vector<double> us;

  double Min() const { return *std::ranges::min_element(us); }
  double Max() const { return *std::ranges::max_element(us); }
  double Median() const {
    std::vector<double> sorted = us;
    std::ranges::nth_element(sorted, sorted.begin() + static_cast<ptrdiff_t>(sorted.size() / 2));
    return sorted[sorted.size() / 2];
  }
};

void Measure(std::vector<Timing>& timings, const Options& o) {
  uint32_t layer = 0;  // each time the one that was read longest ago
  for (uint32_t i = 0; i < o.iterations + 1; ++i) {
    for (Timing& timing : timings) {
      const auto start = std::chrono::steady_clock::now();
      timing.run(layer++ % o.layers);
      const auto end = std::chrono::steady_clock::now();
      if (i == 0) continue;  // warms up threads and buffers
      timing.us.push_back(std::chrono::duration<double, std::micro>(end - start).count());
    }
  }
}

std::string Line(const Timing& t, const Step& step) {
  char line[160];
  std::snprintf(line, sizeof(line),
                "%-6s %9.0f %9.0f %9.0f us   %6.2f GB/s of distinct K and V  %7.1f GFLOP/s of the "
                "prefix\n",
                t.name.c_str(), t.Min(), t.Median(), t.Max(),
                static_cast<double>(step.layer_bytes()) / t.Median() / 1e3,
                static_cast<double>(step.prefix_flops()) / t.Median() / 1e3);
  return line;
}

void Report(const Options& o, const Step& step, const std::vector<Timing>& timings,
            float difference) {
  if (!o.json) {
    std::string text = "kernel " + std::string(attention::BestTileKernel().name) + ", " +
                       std::to_string(Parallelism()) + " threads; " + step.decision().why +
                       "; relay differs from paged by at most " + std::to_string(difference) +
                       "\n             min    median       max\n";
    for (const Timing& timing : timings) text += Line(timing, step);
    return WriteOut(text);
  }
  nlohmann::json report = {{"schema", 1},
                           {"benchmark", "attention"},
                           {"kernel", attention::BestTileKernel().name},
                           {"threads", Parallelism()},
                           {"num_reqs", o.num_reqs},
                           {"prefix_len", o.prefix_len},
                           {"context_len", o.context_len},
                           {"num_query_heads", o.num_query_heads},
                           {"num_kv_heads", o.num_kv_heads},
                           {"head_size", o.head_size},
                           {"block_size", o.block_size},
                           {"kv_dtype", o.kv_dtype},
                           {"kv_layout", o.kv_layout},
                           {"iterations", o.iterations},
                           {"distinct_kv_bytes", step.layer_bytes()},
                           {"prefix_flops", step.prefix_flops()},
                           {"max_difference", difference}};
  for (const Timing& timing : timings) {
    report["results"][timing.name] = {
        {"min_us", timing.Min()}, {"median_us", timing.Median()}, {"max_us", timing.Max()}};
  }
  WriteOut(report.dump() + "\n");
}

int Run(const Options& o) {
  if (o.threads > 0) SetParallelism(static_cast<int>(o.threads));
  const auto dtype = DTypeFromName(o.kv_dtype);
  const auto format = KvFormatFromName(o.kv_layout);
  const auto wrong = [&](const std::string& what) {
    ReportFailure("bench_attention", Status(Code::kInvalidArgument, what), "", o.json);
    return kExitUsage;
  };
  if (!dtype || !format || o.num_query_heads % o.num_kv_heads != 0) {
    return wrong(std::to_string(o.num_query_heads) + " query heads are no multiple of " +
                 std::to_string(o.num_kv_heads) + " KV heads");
  }
  if (o.context_len == 0 && o.prefix_len < o.block_size) {
    return wrong("prefix_len = " + std::to_string(o.prefix_len) + " gives no block to attend to");
  }
  Step step(o, *dtype, *format);
  step.Paged(0);
  const std::vector<float> paged = step.out();
  step.Relay(0);
  float difference = 0;
  for (size_t i = 0; i < paged.size(); ++i) {
    difference = std::max(difference, std::fabs(paged[i] - step.out()[i]));
  }
  std::vector<Timing> timings = {{"read", [&](uint32_t layer) { step.Read(layer); }, {}},
                                 {"paged", [&](uint32_t layer) { step.Paged(layer); }, {}},
                                 {"relay", [&](uint32_t layer) { step.Relay(layer); }, {}}};
  if (step.prefix_flops() > 0) {
    timings.push_back({"gemm", [&](uint32_t layer) { step.Gemm(layer); }, {}});
  }
  Measure(timings, o);
  Report(o, step, timings, difference);
  return 0;
}

}  // namespace
}  // namespace kvrelay::tools

int main(int argc, char** argv) {
  using namespace kvrelay::tools;
  PrepareStandardStreams();
  const std::vector<std::string> args(argv + 1, argv + argc);
  Options options;
  FlagSet flags("bench_attention [flags]",
                "Times relay and paged attention of one decode step on the CPU.",
                "bench_attention --num_reqs=64 --prefix_len=512 --context_len=128 --json");
  const auto action = ParseOptions(args, options, flags);
  if (!action.has_value()) {
    ReportFailure("bench_attention", action.error(), "", AsksForJson(args));
    return kExitUsage;
  }
  if (*action != Action::kRun) {
    WriteOut(flags.Help());
    return 0;
  }
  return Run(options);
}
