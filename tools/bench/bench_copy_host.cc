// The host copy beside its floors, GB/s (10^9 bytes of the source a second): scattered slices of a
// mapped region into another region.
//
//   bench_copy_host [--mib=256] [--rounds=15] [--threads=1,4] [--slices=256,4096] [--casts]
//                   [--plans] [--json=FILE]
//
// Rows: memcpy of each slice; the best scattered loop that we know of written out for this one
// shape (vector loads, non-temporal stores, the next slices asked for); ExecuteCopy of a plan; with
// --casts also plans that cast bf16 to fp8_e4m3, fp32 to bf16 and bf16 to fp16 with a scale.
// --plans times the planner instead. Each round runs all rows on the same machine state, their
// order turning; ratios are taken within a round. Rounds move through both regions, which are four
// times as large as one copy: nothing is found in a cache by chance.
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <functional>
#include <iostream>
#include <numeric>
#include <random>
#include <sstream>
#include <string>
#include <string_view>
#include <vector>

#include "base/parallel.h"
#include "kvcache/copy_host.h"
#include "kvcache/plan_pull.h"
#include "kvcache/region.h"
#include "kvcache/stream_chunks.h"
#include "proto/codec.h"
#include "tools/common/scattered_copy.h"

namespace kvrelay {
namespace {

struct Options {
  uint64_t mib = 256;
  int rounds = 15;
  std::vector<int> threads = {1, 4};
  std::vector<int> slices = {256, 512, 1024, 2048, 4096, 16384, 65536, 262144};
  bool casts = false;
  bool plans = false;
  std::string json;
};

double Median(std::vector<double> values) {
  std::sort(values.begin(), values.end());
  return values[values.size() / 2];
}

// One way to copy, and what its rounds gave.
struct Way {
  std::string name;
  std::function<void()> copy;
  std::vector<double> rates = {};
  std::vector<double> ratios = {};  // to the best floor of the same round
};

double Seconds(const std::function<void()>& fn) {
  const auto start = std::chrono::steady_clock::now();
  fn();
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

class Bench {
 public:
  Bench(const Options& options, const MappedRegion& src, const Region& dst)
      : options_(options), src_(src), dst_(dst), src_bases_{src.data()}, dst_bases_{dst.data()} {}

  // The rows of one slice size and number of threads.
  std::vector<Way> Measure(uint64_t slice, int threads) {
    SetParallelism(threads);
    const uint64_t slices = (options_.mib << 20) / slice;
    CopyPlan plan;
    plan.boxes.resize(1);
    plan.boxes[0].run_bytes = slice;
    plan.boxes[0].num_segments = static_cast<uint32_t>(slices);
    plan.places.resize(1);
    plan.segments.resize(slices);
    std::vector<Way> ways;
    ways.push_back({"memcpy", [&, slice] {
                      tools::CopySlices(plan.segments, slice, src_.data(), dst_.data());
                    }});
    ways.push_back({"loop, non-temporal", [&, slice] {
                      tools::StreamSlices(plan.segments, slice, src_.data(), dst_.data());
                    }});
    ways.push_back({"ExecuteCopy", [&] { ExecuteCopy(plan, src_bases_, dst_bases_); }});
    std::vector<CopyPlan> casts;
    if (options_.casts) {
      casts = {Cast(plan, DType::kBf16, DType::kFp8E4m3), Cast(plan, DType::kFp32, DType::kBf16),
               Cast(plan, DType::kBf16, DType::kFp16)};
      for (CopyPlan& cast : casts) {
        ways.push_back({std::string(DTypeName(cast.boxes[0].cast.from)) + " to " +
                            std::string(DTypeName(cast.boxes[0].cast.to)),
                        [this, &cast, &plan] {
                          cast.segments = plan.segments;
                          ExecuteCopy(cast, src_bases_, dst_bases_);
                        }});
      }
    }
    Choose(plan, slice);
    for (int round = -1; round < options_.rounds; ++round) {
      std::vector<double> rates(ways.size());
      for (size_t i = 0; i < ways.size(); ++i) {
        const size_t which = (i + static_cast<size_t>(round + 1)) % ways.size();
        Choose(plan, slice);
        rates[which] = static_cast<double>(slices * slice) / Seconds(ways[which].copy) / 1e9;
      }
      if (round < 0) continue;  // starts the threads
      for (size_t i = 0; i < ways.size(); ++i) {
        ways[i].rates.push_back(rates[i]);
        ways[i].ratios.push_back(rates[i] / std::max(rates[0], rates[1]));
      }
    }
    return ways;
  }

 private:
  // The same slices of the source, multiplied and converted.
  CopyPlan Cast(const CopyPlan& plan, DType from, DType to) const {
    CopyPlan cast = plan;
    CopyBox& box = cast.boxes[0];
    box.casts = true;
    box.cast = {from, to, 0, 0, 0, 0};
    box.run_bytes = box.run_bytes / SizeOf(from) * SizeOf(to);
    cast.factors = {0.37F};
    return cast;
  }

  // The next slices, scattered over both regions.
  void Choose(CopyPlan& plan, uint64_t slice) {
    const uint64_t places = src_.bytes() / slice - 1;
    if (from_.size() != places) {
      std::mt19937_64 random(slice);
      from_.resize(places);
      std::iota(from_.begin(), from_.end(), 0);
      to_ = from_;
      std::shuffle(from_.begin(), from_.end(), random);
      std::shuffle(to_.begin(), to_.end(), random);
    }
    for (CopySegment& segment : plan.segments) {
      segment = {from_[next_ % places] * slice, to_[next_ % places] * slice};
      ++next_;
    }
  }

  const Options& options_;
  const MappedRegion& src_;
  const Region& dst_;
  const std::vector<const std::byte*> src_bases_;
  const std::vector<std::byte*> dst_bases_;
  std::vector<uint32_t> from_;
  std::vector<uint32_t> to_;
  uint64_t next_ = 0;
};

// On the wire: the answer to a claim, of one rank, and a packed read without the transport's
// address.
size_t ClaimBytes(const KvShard& shard, const std::vector<BlockId>& blocks, uint32_t tokens) {
  return proto::Encode(proto::ClaimReply{.tables = {{.blocks = blocks}},
                                         .first_token = 0,
                                         .tokens = tokens,
                                         .ranks = {{.endpoint = "tcp://127.0.0.1:43210",
                                                    .rank = 0,
                                                    .incarnation = UINT64_MAX,
                                                    .slot = 4095,
                                                    .epoch = UINT64_MAX >> 16,
                                                    .shard = shard,
                                                    .scales = {}}},
                                         .ttl_ms = 30'000})
      .size();
}
size_t PackedReadBytes(const StreamShape& shape) {
  proto::PackedRead read;
  read.shape = shape;
  read.reader_incarnation = read.owner_incarnation = read.stream = UINT64_MAX;
  read.epoch = UINT64_MAX >> 16;
  read.chunk_bytes = 1 << 20;
  read.transport = "ucx-packed";
  read.timeout_ms = 30'000;
  return proto::Encode(read).size();
}

// 80 layers x K, V x 750 blocks: 120,000 slices, and harder ones.
void MeasurePlans(const Options& options) {
  struct Case {
    const char* name;
    KvFormat reader;
    DType dtype;
    uint32_t owner_block;
    uint32_t reader_block;
    uint32_t heads;
  };
  const Case cases[] = {
      {"blocks of 16 to blocks of 16", KvFormat::kNhd, DType::kBf16, 16, 16, 8},
      {"HND to NHD, half of the heads", KvFormat::kHnd, DType::kBf16, 16, 16, 4},
      {"blocks of 16 to 128", KvFormat::kNhd, DType::kBf16, 16, 128, 8},
      {"blocks of 24 to 17", KvFormat::kNhd, DType::kBf16, 24, 17, 8},
      {"bf16 to fp8, a scale per head", KvFormat::kNhd, DType::kFp8E4m3, 16, 16, 8}};
  constexpr uint32_t kTokens = 750 * 16;
  std::printf("%-32s %9s %9s %9s %9s %9s   us to plan, min / median / max; us to check\n",
              "plan of 12,000 tokens", "slices", "KiB", "boxes", "claim B", "packed B");
  for (const Case& c : cases) {
    const KvLayout owner =
        KvLayout::Dense(KvFormat::kNhd, DType::kBf16, 80, 8, 128, c.owner_block, 2000);
    KvLayout reader = KvLayout::Dense(c.reader, c.dtype, 80, 8, 128, c.reader_block, 2000);
    if (c.dtype != DType::kBf16) {
      reader.scales = {true, std::vector<float>(80 * 8, 0.5F), std::vector<float>(80 * 8, 0.25F)};
      reader.scales.k[3] = 2;
    }
    const KvShard shard = KvShard::Make(80, 8, 1, 0).value();
    std::vector<BlockId> blocks(1000);
    std::iota(blocks.begin(), blocks.end(), 7);
    std::shuffle(blocks.begin(), blocks.end(), std::mt19937_64(1));
    const std::vector<uint64_t> owner_bytes = {owner.dense_bytes()};
    const std::vector<uint64_t> reader_bytes = {reader.dense_bytes()};
    std::vector<double> plan_us;
    std::vector<double> check_us;
    CopyPlan plan;
    for (int round = 0; round < options.rounds * 10; ++round) {
      plan_us.push_back(1e6 * Seconds([&] {
                          plan = PlanPull({owner, shard, {blocks}}, {reader, shard, {blocks}}, 0,
                                          c.heads, {0, kTokens})
                                     .value();
                        }));
      check_us.push_back(1e6 * Seconds([&] {
                           if (!plan.Validate(owner_bytes, reader_bytes).ok()) std::abort();
                         }));
    }
    const auto [least, most] = std::minmax_element(plan_us.begin(), plan_us.end());
    const StreamShape shape =
        StreamsOf({owner, shard, {blocks}}, {reader, shard, {blocks}},
                  {.owner = 0, .head_begin = 0, .head_end = c.heads}, {0, kTokens})
            .value()
            .front();
    blocks.resize((kTokens + c.owner_block - 1) / c.owner_block);
    std::printf("%-32s %9llu %9.1f %9zu %9zu %9zu   %.1f / %.1f / %.1f; %.1f\n", c.name,
                static_cast<unsigned long long>(plan.slices()),
                static_cast<double>(plan.memory()) / 1024, plan.boxes.size(),
                ClaimBytes(shard, blocks, kTokens), PackedReadBytes(shape), *least, Median(plan_us),
                *most, Median(check_us));
  }
}

void Print(uint64_t slice, int threads, const std::vector<Way>& ways) {
  for (const Way& way : ways) {
    const auto [least, most] = std::minmax_element(way.rates.begin(), way.rates.end());
    const auto [low, high] = std::minmax_element(way.ratios.begin(), way.ratios.end());
    std::printf("%8llu %7d  %-20s %6.2f / %6.2f / %6.2f   %5.2f / %5.2f / %5.2f\n",
                static_cast<unsigned long long>(slice), threads, way.name.c_str(), *least,
                Median(way.rates), *most, *low, Median(way.ratios), *high);
  }
  std::fflush(stdout);
}

std::string Json(uint64_t slice, int threads, const std::vector<Way>& ways) {
  std::ostringstream out;
  for (const Way& way : ways) {
    const auto [least, most] = std::minmax_element(way.rates.begin(), way.rates.end());
    const auto [low, high] = std::minmax_element(way.ratios.begin(), way.ratios.end());
    out << (&way == ways.data() ? "" : ",") << "\n{\"slice_bytes\":" << slice
        << ",\"threads\":" << threads << ",\"way\":\"" << way.name << "\",\"min\":" << *least
        << ",\"median\":" << Median(way.rates) << ",\"max\":" << *most
        << ",\"ratio\":{\"min\":" << *low << ",\"median\":" << Median(way.ratios)
        << ",\"max\":" << *high << "}}";
  }
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
    const std::string_view name = arg.substr(0, equals);
    const std::string value(equals == std::string_view::npos ? "" : arg.substr(equals + 1));
    if (name == "--mib") {
      options.mib = std::strtoull(value.c_str(), nullptr, 10);
    } else if (name == "--rounds") {
      options.rounds = std::atoi(value.c_str());
    } else if (name == "--threads") {
      options.threads = Numbers(value);
    } else if (name == "--slices") {
      options.slices = Numbers(value);
    } else if (name == "--casts") {
      options.casts = true;
    } else if (name == "--plans") {
      options.plans = true;
    } else if (name == "--json") {
      options.json = value;
    } else {
      return false;
    }
  }
  const auto in = [](const std::vector<int>& numbers, int multiple, int most) {
    return !numbers.empty() && std::all_of(numbers.begin(), numbers.end(), [&](int number) {
      return number >= 1 && number % multiple == 0 && number <= most;
    });
  };
  return options.mib >= 1 && options.mib <= 4096 && options.rounds >= 1 &&
         in(options.threads, 1, 1024) && in(options.slices, 64, 1 << 20);
}

int Main(int argc, char** argv) {
  Options options;
  if (!Parse(argc, argv, options)) {
    std::cerr << "usage: bench_copy_host [--mib=256] [--rounds=15] [--threads=1,4] "
                 "[--slices=256,4096] [--casts] [--plans] [--json=FILE]\n"
                 "slices are multiples of 64\n";
    return 2;
  }
  if (options.plans) {
    MeasurePlans(options);
    return 0;
  }
  const uint64_t bytes = options.mib << 22;
  const auto src = Region::AllocateHost(bytes, "bench_src");
  const auto dst = Region::AllocateHost(bytes, "bench_dst");
  if (!src || !dst) {
    std::cerr << (src ? dst : src).error().ToString() << "\n";
    return 1;
  }
  std::mt19937_64 random(1);
  for (uint64_t at = 0; at < bytes; at += 8) {
    // Numbers from 2^-7 to 8 as bf16 and fp32. (Where products are fp32 subnormals the processor
    // takes 150 cycles for each; caches hold none.)
    const uint64_t word = (random() & 0x807f807f807f807fULL) | 0x3c003c003c003c00ULL |
                          (random() & 0x0380038003800380ULL);
    std::memcpy(src->data() + at, &word, sizeof(word));
  }
  const auto mapped = MappedRegion::Map(UniqueFd(::dup(src->export_fd())), bytes);
  if (!mapped) {
    std::cerr << mapped.error().ToString() << "\n";
    return 1;
  }
  double load[3] = {};
  if (::getloadavg(load, 3) < 1) load[0] = -1;
  std::printf(
      "%llu MiB a copy, %d rounds, load average %.1f, GB/s and ratio to the better floor: min / "
      "median / max\n%8s %7s\n",
      static_cast<unsigned long long>(options.mib), options.rounds, load[0], "slice", "threads");
  std::string rows;
  Bench bench(options, *mapped, *dst);
  for (const int threads : options.threads) {
    for (const int slice : options.slices) {
      const std::vector<Way> ways = bench.Measure(static_cast<uint64_t>(slice), threads);
      Print(static_cast<uint64_t>(slice), threads, ways);
      rows += (rows.empty() ? "" : ",") + Json(static_cast<uint64_t>(slice), threads, ways);
    }
  }
  if (!options.json.empty()) {
    std::ofstream file(options.json);
    file << "{\"schema\":2,\"benchmark\":\"copy_host\",\"unit\":\"GB/s\",\"copy_bytes\":"
         << (options.mib << 20) << ",\"rounds\":" << options.rounds << ",\"load\":" << load[0]
         << ",\"rows\":[" << rows << "]}\n";
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
