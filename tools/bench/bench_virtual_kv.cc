// What a virtual KV cache costs and saves: the time that its calls take of an engine's steps, with
// pages mapped when they are needed and ahead of that, and its memory beside a paged cache's and a
// static reservation's, over a trace of requests.
//
//   bench_virtual_kv --help
//
// Continuous batching, one token a step for each running request. A step is its call (step, or
// step_async), then the computation: writing the K and V of its new tokens, and waiting for the
// rest of `compute_us`. All modes and page sizes run the same trace, interleaved by round. Memory
// is what the system counts; of the paged cache and the reservation, what the same requests would
// hold.
#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <deque>
#include <nlohmann/json.hpp>
#include <optional>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "kvcache/sparse_memory.h"
#include "kvcache/virtual_kv_cache.h"
#include "tools/bench/must.h"
#include "tools/bench/program.h"
#include "tools/common/flags.h"

namespace kvrelay {
namespace {

using bench::Check;
using bench::Must;
using nlohmann::ordered_json;
using std::chrono::steady_clock;

constexpr uint32_t kHeads = 4;
constexpr uint32_t kDim = 64;
constexpr uint32_t kBlockSize = 16;

struct Settings {
  std::vector<uint32_t> page_kib = {64, 256, 2048};
  uint32_t layers = 8;
  uint32_t batch = 16;
  uint32_t max_seq_len = 4096;
  uint32_t requests = 96;
  uint32_t pool_mib = 256;
  uint32_t compute_us = 1000;
  uint32_t rounds = 3;
  uint32_t seed = 1;
  std::string json;

  uint64_t token_bytes() const { return uint64_t{2} * layers * kHeads * kDim * 2; }
};

struct Length {
  uint32_t prompt = 0;
  uint32_t answer = 0;
  uint32_t total() const { return prompt + answer; }
};

// Log-normal, as lengths of real prompts and answers are: half of the prompts are shorter than an
// eighth of the longest, half of the answers than a 32nd.
std::vector<Length> Trace(const Settings& settings) {
  std::mt19937_64 random(settings.seed);
  const auto draw = [&](uint32_t median) {
    std::lognormal_distribution<double> lengths(std::log(median), 0.8);
    return std::clamp(static_cast<uint32_t>(lengths(random)), 1U, settings.max_seq_len / 2);
  };
  std::vector<Length> trace(settings.requests);
  for (Length& length : trace) {
    length = {draw(settings.max_seq_len / 8), draw(settings.max_seq_len / 32)};
  }
  return trace;
}

double Micros(steady_clock::time_point since) {
  return std::chrono::duration<double, std::micro>(steady_clock::now() - since).count();
}

ordered_json TimesOf(std::vector<double> us) {
  std::ranges::sort(us);
  double sum = 0;
  for (const double one : us) sum += one;
  const auto at = [&](double part) {
    return us[static_cast<size_t>(part * static_cast<double>(us.size() - 1))];
  };
  return {{"calls", us.size()}, {"mean", sum / static_cast<double>(us.size())},
          {"p50", at(0.5)},     {"p99", at(0.99)},
          {"max", us.back()},   {"sum", sum}};
}

// Over the steps of a run, in MB of 2^20 bytes.
struct Memory {
  double sum = 0;
  double peak = 0;
  uint64_t steps = 0;

  void Add(double mb) {
    sum += mb;
    peak = std::max(peak, mb);
    ++steps;
  }
  ordered_json json() const { return {{"mean", sum / static_cast<double>(steps)}, {"peak", peak}}; }
};

struct Run {
  std::vector<double> alloc_us;
  std::vector<double> free_us;
  std::vector<double> step_us;
  Memory resident;
  Memory paged;
  Memory tokens;
  double utilization = 0;    // mean over steps
  double fragmentation = 0;  // the same
  VirtualKvMetrics last;
};

// One page size on one trace.
class Engine {
 public:
  Engine(const Settings& settings, uint64_t page_bytes) : settings_(settings) {
    const VirtualKvShape shape = {.num_layers = settings.layers,
                                  .num_kv_heads = kHeads,
                                  .head_size = kDim,
                                  .max_batch_size = settings.batch,
                                  .max_seq_len = settings.max_seq_len,
                                  .dtype = DType::kFp16,
                                  .page_size = page_bytes,
                                  .block_size = kBlockSize,
                                  .megacache = true};
    const VirtualLayout layout = Must(VirtualLayout::Make(std::vector{shape})).front();
    memory_ = Must(SparseMemory::Create(layout.bytes(), page_bytes, "bench-virtual-kv"));
    cache_ = Must(VirtualKvCache::Create({{layout, memory_}}));
    const Status reserved = cache_->ReservePhysicalPages(uint64_t{settings.pool_mib} << 20);
    Check(reserved.ok(), reserved.ToString());
  }

  Run Serve(const std::vector<Length>& trace, bool async) {
    std::deque<Length> waiting(trace.begin(), trace.end());
    std::vector<std::optional<Sequence>> rows(settings_.batch);
    std::vector<uint32_t> lens(settings_.batch);
    uint32_t running = 0;
    while (!waiting.empty() || running > 0) {
      while (!waiting.empty() && Admit(waiting.front(), rows, lens)) {
        waiting.pop_front();
        ++running;
      }
      Check(running > 0, "the pool holds no single request: raise --pool_mib");
      const auto start = steady_clock::now();
      const Status status = async ? cache_->StepAsync(lens) : cache_->Step(lens);
      run_.step_us.push_back(Micros(start));
      Check(status.ok(), status.ToString());
      Compute(rows, lens);
      Measure(lens);
      running -= Retire(rows, lens);
    }
    cache_->WaitForBackground();
    run_.last = cache_->metrics();
    return std::move(run_);
  }

 private:
  struct Sequence {
    Length length;
    uint32_t written = 0;  // tokens
  };

  bool Admit(const Length& length, std::vector<std::optional<Sequence>>& rows,
             std::vector<uint32_t>& lens) {
    const auto start = steady_clock::now();
    const Result<uint32_t> row = cache_->AllocNewBatchIdx(length.prompt, length.total());
    const double us = Micros(start);
    if (!row) return false;
    run_.alloc_us.push_back(us);
    rows[*row] = Sequence{length};
    lens[*row] = length.prompt;
    return true;
  }

  void Compute(std::vector<std::optional<Sequence>>& rows, const std::vector<uint32_t>& lens) {
    const auto until = steady_clock::now() + std::chrono::microseconds(settings_.compute_us);
    const VirtualLayout& layout = cache_->layout();
    for (uint32_t row = 0; row < lens.size(); ++row) {
      if (lens[row] == 0) continue;
      std::byte* const start = memory_->data() + layout.FirstPage(0, row) * layout.page_bytes;
      std::memset(start + rows[row]->written * layout.kv.token_stride, 1,
                  (lens[row] - rows[row]->written) * layout.kv.token_stride);
      rows[row]->written = lens[row];
    }
    std::this_thread::sleep_until(until);
  }

  void Measure(const std::vector<uint32_t>& lens) {
    const VirtualKvMetrics now = cache_->metrics();
    uint64_t tokens = 0;
    uint64_t blocks = 0;
    for (const uint32_t length : lens) {
      tokens += length;
      blocks += (length + kBlockSize - 1) / kBlockSize;
    }
    const auto mb = [&](uint64_t count) {
      return static_cast<double>(count * settings_.token_bytes()) / (1 << 20);
    };
    run_.resident.Add(now.optimized_memory_mb);
    run_.paged.Add(mb(blocks * kBlockSize));
    run_.tokens.Add(mb(tokens));
    const auto steps = static_cast<double>(run_.resident.steps);
    run_.utilization += (now.utilization - run_.utilization) / steps;
    run_.fragmentation += (now.fragmentation - run_.fragmentation) / steps;
  }

  // Ends what is complete and lets the others grow; how many ended.
  uint32_t Retire(std::vector<std::optional<Sequence>>& rows, std::vector<uint32_t>& lens) {
    uint32_t ended = 0;
    for (uint32_t row = 0; row < lens.size(); ++row) {
      if (lens[row] == 0) continue;
      if (lens[row] < rows[row]->length.total()) {
        ++lens[row];
        continue;
      }
      const auto start = steady_clock::now();
      const Status status = cache_->FreeBatchIdx(row);
      run_.free_us.push_back(Micros(start));
      Check(status.ok(), status.ToString());
      rows[row].reset();
      lens[row] = 0;
      ++ended;
    }
    return ended;
  }

  const Settings& settings_;
  std::shared_ptr<SparseMemory> memory_;
  std::unique_ptr<VirtualKvCache> cache_;
  Run run_;
};

ordered_json RowOf(uint32_t page_kib, bool async, uint32_t round, const Run& run) {
  const VirtualKvMetrics& m = run.last;
  return {{"page_kib", page_kib},
          {"mode", async ? "step_async" : "step"},
          {"round", round},
          {"alloc_us", TimesOf(run.alloc_us)},
          {"free_us", TimesOf(run.free_us)},
          {"step_us", TimesOf(run.step_us)},
          {"pages_mapped", m.pages_mapped},
          {"pages_mapped_ahead", m.pages_mapped_ahead},
          {"pages_reused", m.pages_reused},
          {"pages_reclaimed", m.pages_reclaimed},
          {"memory_mb",
           {{"virtual", run.resident.json()},
            {"paged", run.paged.json()},
            {"static", m.baseline_memory_mb},
            {"tokens", run.tokens.json()}}},
          {"memory_savings_percent", 100 * (1 - run.resident.peak / m.baseline_memory_mb)},
          {"utilization", run.utilization},
          {"fragmentation", run.fragmentation}};
}

std::optional<Settings> Parse(int argc, char** argv) {
  Settings settings;
  tools::FlagSet flags("bench_virtual_kv [flags]",
                       "What a virtual KV cache costs an engine's steps and saves of its memory.",
                       "bench_virtual_kv --page_kib=64,2048 --json=virtual_kv.json");
  flags.Ids("page_kib", &settings.page_kib, "Page sizes, in KiB.");
  flags.Whole("layers", &settings.layers, 1, 256, "Layers: 1 KiB of each token.");
  flags.Whole("batch", &settings.batch, 1, 4096, "Requests that run at the same time.");
  flags.Whole("max_seq_len", &settings.max_seq_len, 64, 1 << 20, "Tokens of the longest.");
  flags.Whole("requests", &settings.requests, 1, 1 << 20, "Requests of the trace.");
  flags.Whole("pool_mib", &settings.pool_mib, 1, 1 << 20, "Physical pages.");
  flags.Whole("compute_us", &settings.compute_us, 0, 1'000'000, "Microseconds that a step takes.");
  flags.Whole("rounds", &settings.rounds, 1, 1000, "Runs of each page size and mode.");
  flags.Whole("seed", &settings.seed, 0, UINT32_MAX, "Of the trace.");
  flags.Text("json", &settings.json, "FILE", "Also write the figures there.");
  if (!bench::ParseFlags(flags, argc, argv)) return std::nullopt;
  Check(!settings.page_kib.empty(), "--page_kib is empty");
  return settings;
}

int Main(int argc, char** argv) {
  const std::optional<Settings> parsed = Parse(argc, argv);
  if (!parsed) return 0;
  const Settings& settings = *parsed;
  const std::vector<Length> trace = Trace(settings);
  ordered_json report = {{"benchmark", "virtual_kv"},
                         {"token_bytes", settings.token_bytes()},
                         {"batch", settings.batch},
                         {"max_seq_len", settings.max_seq_len},
                         {"requests", settings.requests},
                         {"pool_mib", settings.pool_mib},
                         {"compute_us", settings.compute_us},
                         {"rounds", settings.rounds},
                         {"seed", settings.seed},
                         {"rows", ordered_json::array()}};
  for (uint32_t round = 0; round < settings.rounds; ++round) {
    for (const uint32_t page_kib : settings.page_kib) {
      for (const bool first : {true, false}) {
        const bool async = first == (round % 2 == 0);
        Engine engine(settings, uint64_t{page_kib} << 10);
        const Run run = engine.Serve(trace, async);
        const ordered_json row = RowOf(page_kib, async, round, run);
        const auto us = [&](const char* what, const char* which) {
          return row[what][which].get<double>();
        };
        std::printf(
            "pages of %4u KiB, %-10s | step, us: mean %6.2f p99 %7.1f max %7.1f | alloc, us: p50 "
            "%7.1f p99 %7.1f | peak MB: virtual %6.1f paged %6.1f static %6.1f\n",
            page_kib, async ? "step_async" : "step", us("step_us", "mean"), us("step_us", "p99"),
            us("step_us", "max"), us("alloc_us", "p50"), us("alloc_us", "p99"), run.resident.peak,
            run.paged.peak, run.last.baseline_memory_mb);
        std::fflush(stdout);
        report["rows"].push_back(row);
      }
    }
  }
  bench::WriteReport(report, settings.json);
  return 0;
}

}  // namespace
}  // namespace kvrelay

int main(int argc, char** argv) { return kvrelay::Main(argc, argv); }
