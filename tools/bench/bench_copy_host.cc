// The host copy beside memcpy: scattered slices of a mapped region into another region, GB/s (10^9
// bytes copied a second).
//
//   bench_copy_host [--mib=256] [--rounds=15] [--threads=1,4] [--slices=256,4096] [--json=FILE]
//
// Each round runs both on the same slices, so that a machine's noise falls on both; the order
// changes from round to round. Rounds move through both regions, which are four times as large as
// one copy: nothing is found in a cache by chance.
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <iostream>
#include <numeric>
#include <random>
#include <sstream>
#include <string>
#include <string_view>
#include <vector>

#include "base/parallel.h"
#include "kvcache/copy_host.h"
#include "kvcache/region.h"

namespace kvrelay {
namespace {

struct Options {
  uint64_t mib = 256;
  int rounds = 15;
  std::vector<int> threads = {1, 4};
  std::vector<int> slices = {128, 256, 1024, 2048, 4096, 16384, 65536, 262144};
  std::string json;
};

struct Rates {
  double min = 0;
  double median = 0;
  double max = 0;
};

struct Row {
  uint64_t slice = 0;
  int threads = 0;
  Rates memcpy;
  Rates execute;
  double ratio = 0;  // median of the rounds' ratios
};

double Median(std::vector<double> values) {
  std::sort(values.begin(), values.end());
  return values[values.size() / 2];
}

Rates Summarise(const std::vector<double>& values) {
  const auto [min, max] = std::minmax_element(values.begin(), values.end());
  return {*min, Median(values), *max};
}

void MemcpySlices(const CopyPlan& plan, const std::byte* src, std::byte* dst) {
  const uint64_t run = plan.boxes[0].run_bytes;
  const uint64_t grain = std::max<uint64_t>(1, (uint64_t{1} << 20) / run);
  ParallelFor(plan.segments.size(), grain, [&](size_t begin, size_t end) {
    for (size_t i = begin; i < end; ++i) {
      std::memcpy(dst + plan.segments[i].dst, src + plan.segments[i].src, run);
    }
  });
}

template <typename Fn>
double GigabytesPerSecond(uint64_t bytes, Fn&& copy) {
  const auto start = std::chrono::steady_clock::now();
  copy();
  const std::chrono::duration<double> took = std::chrono::steady_clock::now() - start;
  return static_cast<double>(bytes) / took.count() / 1e9;
}

Row Measure(const Options& options, const MappedRegion& src, const Region& dst, uint64_t slice,
            int threads) {
  SetParallelism(threads);
  const uint64_t slices = (options.mib << 20) / slice;
  const uint64_t places = src.bytes() / slice;
  std::mt19937_64 random(slice);
  std::vector<uint32_t> from(places);
  std::iota(from.begin(), from.end(), 0);
  std::vector<uint32_t> to = from;
  std::shuffle(from.begin(), from.end(), random);
  std::shuffle(to.begin(), to.end(), random);

  CopyPlan plan;
  plan.boxes.resize(1);
  plan.boxes[0].run_bytes = slice;
  plan.boxes[0].num_segments = static_cast<uint32_t>(slices);
  plan.places.resize(1);
  plan.segments.resize(slices);
  const std::byte* const src_bases[] = {src.data()};
  std::byte* const dst_bases[] = {dst.data()};

  uint64_t next = 0;
  const auto choose_slices = [&] {
    for (CopySegment& segment : plan.segments) {
      segment = {from[next] * slice, to[next] * slice};
      next = (next + 1) % places;
    }
  };
  std::vector<double> memcpy_rates;
  std::vector<double> execute_rates;
  std::vector<double> ratios;
  for (int round = -1; round < options.rounds; ++round) {
    double rates[2] = {};
    for (int i = 0; i < 2; ++i) {
      const int which = (round + 2 + i) % 2;
      choose_slices();
      rates[which] = GigabytesPerSecond(plan.bytes(), [&] {
        which == 0 ? MemcpySlices(plan, src.data(), dst.data())
                   : ExecuteCopy(plan, src_bases, dst_bases);
      });
    }
    if (round < 0) continue;  // starts the threads
    memcpy_rates.push_back(rates[0]);
    execute_rates.push_back(rates[1]);
    ratios.push_back(rates[1] / rates[0]);
  }
  return {slice, threads, Summarise(memcpy_rates), Summarise(execute_rates), Median(ratios)};
}

std::string Json(const Options& options, const std::vector<Row>& rows) {
  const auto rates = [](const Rates& r) {
    std::ostringstream out;
    out << "{\"min\":" << r.min << ",\"median\":" << r.median << ",\"max\":" << r.max << "}";
    return out.str();
  };
  std::ostringstream out;
  out << "{\"schema\":1,\"benchmark\":\"copy_host\",\"unit\":\"GB/s\",\"copy_bytes\":"
      << (options.mib << 20) << ",\"rounds\":" << options.rounds << ",\"rows\":[";
  for (size_t i = 0; i < rows.size(); ++i) {
    const Row& row = rows[i];
    out << (i == 0 ? "" : ",") << "\n{\"slice_bytes\":" << row.slice
        << ",\"threads\":" << row.threads << ",\"memcpy\":" << rates(row.memcpy)
        << ",\"execute_copy\":" << rates(row.execute) << ",\"ratio\":" << row.ratio << "}";
  }
  out << "]}\n";
  return out.str();
}

// "1,4"
std::vector<int> Numbers(const std::string& text) {
  std::vector<int> numbers;
  std::istringstream list(text);
  for (std::string one; std::getline(list, one, ',');) numbers.push_back(std::atoi(one.c_str()));
  return numbers;
}

bool Parse(int argc, char** argv, Options& options) {
  for (int i = 1; i < argc; ++i) {
    const std::string_view arg = argv[i];
    const size_t equals = arg.find('=');
    if (equals == std::string_view::npos) return false;
    const std::string_view name = arg.substr(0, equals);
    const std::string value(arg.substr(equals + 1));
    if (name == "--mib") {
      options.mib = std::strtoull(value.c_str(), nullptr, 10);
    } else if (name == "--rounds") {
      options.rounds = std::atoi(value.c_str());
    } else if (name == "--threads") {
      options.threads = Numbers(value);
    } else if (name == "--slices") {
      options.slices = Numbers(value);
    } else if (name == "--json") {
      options.json = value;
    } else {
      return false;
    }
  }
  const auto in = [](const std::vector<int>& numbers, int most) {
    return !numbers.empty() && std::all_of(numbers.begin(), numbers.end(), [most](int number) {
      return number >= 1 && number <= most;
    });
  };
  return options.mib >= 1 && options.mib <= 4096 && options.rounds >= 1 &&
         in(options.threads, 1024) && in(options.slices, 1 << 20);
}

int Main(int argc, char** argv) {
  Options options;
  if (!Parse(argc, argv, options)) {
    std::cerr << "usage: bench_copy_host [--mib=256] [--rounds=15] [--threads=1,4] "
                 "[--slices=256,4096] [--json=FILE]\n";
    return 2;
  }
  const uint64_t bytes = options.mib << 22;
  const auto src = Region::AllocateHost(bytes, "bench_src");
  const auto dst = Region::AllocateHost(bytes, "bench_dst");
  if (!src || !dst) {
    std::cerr << (src ? dst : src).error().ToString() << "\n";
    return 1;
  }
  std::memset(src->data(), 1, bytes);
  const auto mapped = MappedRegion::Map(UniqueFd(::dup(src->export_fd())), bytes);
  if (!mapped) {
    std::cerr << mapped.error().ToString() << "\n";
    return 1;
  }
  std::printf("%llu MiB a copy, %d rounds, GB/s min / median / max\n",
              static_cast<unsigned long long>(options.mib), options.rounds);
  std::printf("%8s %7s   %-22s %-22s %s\n", "slice", "threads", "memcpy", "ExecuteCopy", "ratio");
  std::vector<Row> rows;
  for (const int threads : options.threads) {
    for (const int slice : options.slices) {
      const Row row = Measure(options, *mapped, *dst, static_cast<uint64_t>(slice), threads);
      std::printf("%8llu %7d   %5.2f / %5.2f / %5.2f  %5.2f / %5.2f / %5.2f  %5.2f\n",
                  static_cast<unsigned long long>(row.slice), threads, row.memcpy.min,
                  row.memcpy.median, row.memcpy.max, row.execute.min, row.execute.median,
                  row.execute.max, row.ratio);
      std::fflush(stdout);
      rows.push_back(row);
    }
  }
  if (!options.json.empty()) {
    std::ofstream file(options.json);
    file << Json(options, rows);
    if (!file.flush()) {
      std::cerr << "cannot write " << options.json << "\n";
      return 1;
    }
  }
  return 0;
}

}  // namespace
}  // namespace kvrelay

int main(int argc, char** argv) { return kvrelay::Main(argc, argv); }
