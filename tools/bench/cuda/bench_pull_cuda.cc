// Pulls between two processes, each with an agent and its KV cache on a GPU: from the order to pull
// a claimed lease to its completion, as the engine sees it (guard, tables, kernel, guard, lease),
// against one contiguous copy of the same size on the copy engine, from its call until the host
// sees its end. Blocks are shuffled on both sides, unless the case says that they follow each
// other. A pull is planned when its lease is claimed, which is before the order; how long planning
// takes is measured beside. Pulls come one after the other, and after a pause of 3 ms in which
// threads fall asleep. The owner is on the first GPU, the reader on the same and, where there is
// one with peer access, on the second; then one of the two has its cache in the host's memory,
// pinned for the copy that is compared with, or both stream through it. Every first pull of a case
// is checked byte by byte.
//
// usage: bench_pull_cuda [--json=FILE] [--rounds=N] [--crossed]
//   --crossed: only what has the host's memory on a side, or streams through it
#include <signal.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <filesystem>
#include <fstream>
#include <future>
#include <nlohmann/json.hpp>
#include <numeric>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "agent/engine_agent.h"
#include "attention/cuda/device_array.h"
#include "kvcache/cuda/device_cuda.h"
#include "kvcache/kv_view.h"
#include "kvcache/plan_pull.h"
#include "proto/ticket.h"
#include "tools/bench/engine_rows.h"
#include "tools/bench/spread.h"

namespace kvrelay::bench {
namespace {

using std::chrono::steady_clock;

constexpr uint32_t kHeads = 8;
constexpr uint32_t kDim = 128;
constexpr uint32_t kBlockSize = 16;
constexpr uint64_t kRowBytes = kDim * 2;
constexpr uint32_t kInARow = 8;  // pulls without a pause between them

constexpr int kHost = -1;  // in place of a GPU

std::string NameOf(int place) { return place == kHost ? "host" : "cuda:" + std::to_string(place); }

// Whose memory, and how it gets from the one to the other.
struct Way {
  int owner = 0;
  int reader = 0;
  const char* transport = "mapped";
};

struct Case {
  const char* name;
  uint32_t layers;
  uint32_t tokens;
  uint32_t owner_tp;
  KvFormat owner;
  KvFormat reader;
  bool shuffled = true;
};

// Of one layout (runs of a block), of one of two ranks' heads, of two layouts (runs of a row).
constexpr Case kCases[] = {
    {"small, one layout", 2, 16, 1, KvFormat::kNhd, KvFormat::kNhd},
    {"one layout", 32, 512, 1, KvFormat::kNhd, KvFormat::kNhd},
    {"one layout", 32, 2048, 1, KvFormat::kNhd, KvFormat::kNhd},
    {"one layout", 32, 8192, 1, KvFormat::kNhd, KvFormat::kNhd},
    {"TP 2 to 1", 32, 2048, 2, KvFormat::kNhd, KvFormat::kNhd},
    {"NHD to HND", 32, 512, 1, KvFormat::kNhd, KvFormat::kHnd},
    {"NHD to HND", 32, 2048, 1, KvFormat::kNhd, KvFormat::kHnd},
    {"blocks in order", 32, 2048, 1, KvFormat::kNhd, KvFormat::kNhd, false},
    {"blocks in order", 32, 8192, 1, KvFormat::kNhd, KvFormat::kNhd, false},
};

// Between the host and a GPU.
constexpr Way kCrossings[] = {
    {0, kHost, "auto"}, {kHost, 0, "auto"}, {kHost, 0, "ucx-packed"}, {0, 0, "ucx-packed"}};
constexpr Case kCrossed[] = {
    {"one layout", 32, 512, 1, KvFormat::kNhd, KvFormat::kNhd},
    {"NHD to HND", 32, 512, 1, KvFormat::kNhd, KvFormat::kHnd},
    {"one layout", 32, 2048, 1, KvFormat::kNhd, KvFormat::kNhd},
};

// All blocks of a new pool of a side.
BlockTable TakeBlocks(const Case& c, const std::shared_ptr<BlockPool>& pool, uint32_t seed) {
  BlockTable blocks = Must(pool->Allocate(c.tokens / kBlockSize));
  if (!c.shuffled) return blocks;
  std::vector<uint32_t> order(blocks.blocks().size());
  std::iota(order.begin(), order.end(), 0);
  std::ranges::shuffle(order, std::mt19937(seed));
  BlockTable shuffled;
  for (const uint32_t i : order) shuffled.Append(blocks.Share(i, 1));
  return shuffled;
}

// An engine with its memory on a GPU or the host, and a copy of that on the host to look at.
struct Side {
  Side(const Case& c, KvFormat format, uint32_t tp, int place, const std::string& transport,
       uint32_t max_sms, const std::string& run_dir)
      : device(place == kHost ? nullptr : Must(cuda::OpenDevice(place, {.max_sms = max_sms}))),
        pool(BlockPool::Create(c.tokens / kBlockSize + 1)) {
    std::vector<agent::RankCache> caches;
    for (uint32_t rank = 0; rank < tp; ++rank) {
      shards.push_back(Must(KvShard::Make(c.layers, kHeads, tp, rank)));
      layouts.push_back(KvLayout::Dense(format, DType::kBf16, c.layers, shards.back().head_count,
                                        kDim, kBlockSize, c.tokens / kBlockSize + 1));
      const uint64_t bytes = layouts.back().dense_bytes();
      regions.push_back(std::make_unique<Region>(
          Must(device == nullptr ? Region::AllocateHost(bytes, "bench-pull")
                                 : device->Allocate(bytes, "bench-pull"))));
      host.emplace_back(bytes);
      caches.push_back({layouts.back(), shards.back(), {regions.back().get()}, device});
    }
    agent::EngineAgentOptions options;
    options.model.bytes[0] = 1;
    options.block_size = kBlockSize;
    options.transport = transport;
    options.run_dir = run_dir;
    agent = Must(agent::EngineAgent::Create(options, caches, pool, prefixes));
    agent->Run();
  }
  ~Side() { agent->Shutdown(); }

  void ToPlace() {
    for (size_t rank = 0; rank < host.size(); ++rank) {
      KVRELAY_CUDA(cudaMemcpy(regions[rank]->data(), host[rank].data(), host[rank].size(),
                              cudaMemcpyDefault));
    }
    KVRELAY_CUDA(cudaDeviceSynchronize());
  }
  void FromPlace() {
    for (size_t rank = 0; rank < host.size(); ++rank) {
      KVRELAY_CUDA(cudaMemcpy(host[rank].data(), regions[rank]->data(), host[rank].size(),
                              cudaMemcpyDefault));
    }
  }
  // visit(row on the host, its name) for every row of `tokens` tokens.
  template <typename Visit>
  void ForEachRow(std::span<const BlockId> blocks, uint32_t tokens, Visit visit) {
    for (size_t rank = 0; rank < host.size(); ++rank) {
      bench::ForEachRow(KvView(layouts[rank], {host[rank].data()}), shards[rank], blocks, tokens,
                        visit);
    }
  }

  std::shared_ptr<Device> device;
  std::shared_ptr<BlockPool> pool;
  SystemPrefixStore prefixes{1};
  std::vector<KvLayout> layouts;
  std::vector<KvShard> shards;
  std::vector<std::unique_ptr<Region>> regions;
  std::vector<std::vector<std::byte>> host;
  std::unique_ptr<agent::EngineAgent> agent;
};

// What the reader has of its owner: a socket. It sends a byte for each ticket.
class Owner {
 public:
  explicit Owner(int fd) : fd_(fd) {}
  proto::Ticket NextTicket() {
    Check(send(fd_, "x", 1, MSG_NOSIGNAL) == 1, "the owner has ended");
    std::string bytes(64 << 10, '\0');
    const ssize_t n = recv(fd_, bytes.data(), bytes.size(), 0);
    Check(n > 0, "the owner has ended");
    bytes.resize(static_cast<size_t>(n));
    return Must(proto::DecodeTicket(bytes));
  }

 private:
  const int fd_;
};

void Own(const Case& c, const Way& way, const std::string& run_dir, int fd) {
  Side side(c, c.owner, c.owner_tp, way.owner, way.transport, 16, run_dir);
  const BlockTable all = TakeBlocks(c, side.pool, 1);
  side.ForEachRow(all.blocks(), c.tokens,
                  [](std::byte* row, const RowName& name) { name.Fill(row, kRowBytes); });
  side.ToPlace();
  char asked = 0;
  while (recv(fd, &asked, 1, 0) == 1) {
    const LeaseId lease = OfferAll(*side.agent, all, c.tokens);
    for (uint32_t rank = 0; rank < c.owner_tp; ++rank) {
      side.agent->Writer(rank, lease)->Publish({c.tokens, c.tokens, 0});
    }
    side.agent->Post([&side, lease] { side.agent->owner().MarkFinished(lease); });
    const std::string bytes = proto::EncodeTicket(TicketOf(*side.agent, lease, c.tokens));
    Check(send(fd, bytes.data(), bytes.size(), MSG_NOSIGNAL) == static_cast<ssize_t>(bytes.size()),
          "the reader has ended");
  }
}

struct Pulled {
  double us = 0;
  uint64_t bytes = 0;
  std::string path;
};

// A claimed lease that waits to be pulled, into blocks that stay the caller's.
class ClaimedLoad {
 public:
  ClaimedLoad(Side& reader, Owner& owner, const BlockTable& blocks) : reader_(reader) {
    agent::LoadRequest request{.ticket = owner.NextTicket(),
                               .blocks = {blocks.Share(), 0},
                               .deadline = steady_clock::now() + std::chrono::seconds(60)};
    load_ = Await<std::weak_ptr<agent::Load>>(
        *reader.agent, [&](const std::function<void(std::weak_ptr<agent::Load>)>& started) {
          started(reader.agent->StartLoad(
              std::move(request),
              {.finished =
                   [state = state_](Result<agent::LoadResult> result) {
                     state->finished.set_value({std::move(result), steady_clock::now()});
                   },
               .drained = [state = state_] { state->drained.set_value(); }}));
        });
  }
  Pulled Pull() {
    reader_.agent->Post([state = state_, load = load_] {
      const std::shared_ptr<agent::Load> waiting = load.lock();
      state->asked = steady_clock::now();
      if (waiting) waiting->SetReady();
    });
    Check(state_->drained.get_future().wait_for(std::chrono::seconds(60)) ==
              std::future_status::ready,
          "no KV within a minute");
    auto [result, at] = state_->finished.get_future().get();
    const agent::PullStats stats = Must(std::move(result)).own;
    return {std::chrono::duration<double, std::micro>(at - state_->asked).count(), stats.bytes,
            stats.path};
  }

 private:
  struct State {
    TimePoint asked;
    std::promise<std::pair<Result<agent::LoadResult>, TimePoint>> finished;
    std::promise<void> drained;
  };
  Side& reader_;
  const std::shared_ptr<State> state_ = std::make_shared<State>();
  std::weak_ptr<agent::Load> load_;
};

// One copy on the copy engine, until the host sees its end.
class BigCopy {
 public:
  BigCopy(int from, int to, uint64_t bytes) : from_(from), to_(to), bytes_(bytes) {
    src_ = Allocate(from, bytes);
    KVRELAY_CUDA(cudaMemset(src_, 1, bytes));
    KVRELAY_CUDA(cudaDeviceSynchronize());
    KVRELAY_CUDA(cudaSetDevice(std::max(to, 0)));
    if (from != to && from != kHost && to != kHost) {
      const cudaError_t error = cudaDeviceEnablePeerAccess(from, 0);
      if (error == cudaErrorPeerAccessAlreadyEnabled) (void)cudaGetLastError();
    }
    dst_ = Allocate(to, bytes);
    KVRELAY_CUDA(cudaStreamCreateWithFlags(&stream_, cudaStreamNonBlocking));
    KVRELAY_CUDA(cudaEventCreateWithFlags(&end_, cudaEventDisableTiming));
  }
  ~BigCopy() {
    Free(from_, src_);
    Free(to_, dst_);
    cudaEventDestroy(end_);
    cudaStreamDestroy(stream_);
  }
  double Us() {
    KVRELAY_CUDA(cudaSetDevice(std::max(to_, 0)));
    const auto begin = steady_clock::now();
    KVRELAY_CUDA(cudaMemcpyAsync(dst_, src_, bytes_, cudaMemcpyDefault, stream_));
    KVRELAY_CUDA(cudaEventRecord(end_, stream_));
    while (cudaEventQuery(end_) == cudaErrorNotReady) {
    }
    return std::chrono::duration<double, std::micro>(steady_clock::now() - begin).count();
  }

 private:
  static void* Allocate(int place, uint64_t bytes) {
    void* memory = nullptr;
    if (place == kHost) {
      KVRELAY_CUDA(cudaHostAlloc(&memory, bytes, cudaHostAllocDefault));
    } else {
      KVRELAY_CUDA(cudaSetDevice(place));
      KVRELAY_CUDA(cudaMalloc(&memory, bytes));
    }
    return memory;
  }
  static void Free(int place, void* memory) {
    place == kHost ? cudaFreeHost(memory) : cudaFree(memory);
  }

  const int from_;
  const int to_;
  const uint64_t bytes_;
  void* src_ = nullptr;
  void* dst_ = nullptr;
  cudaStream_t stream_ = nullptr;
  cudaEvent_t end_ = nullptr;
};

// What PlanPull takes of all of the owner's first rank, in us: the median of many.
double PlanUs(const Case& c, const Side& reader, const BlockTable& blocks) {
  const KvShard shard = Must(KvShard::Make(c.layers, kHeads, c.owner_tp, 0));
  const KvLayout layout = KvLayout::Dense(c.owner, DType::kBf16, c.layers, shard.head_count, kDim,
                                          kBlockSize, c.tokens / kBlockSize + 1);
  std::vector<double> us;
  for (int i = 0; i < 101; ++i) {
    const auto begin = steady_clock::now();
    const CopyPlan plan = Must(PlanPull({layout, shard, {blocks.blocks()}},
                                        {reader.layouts[0], reader.shards[0], {blocks.blocks()}},
                                        shard.head_begin, shard.head_end(), {0, c.tokens}));
    us.push_back(std::chrono::duration<double, std::micro>(steady_clock::now() - begin).count());
    Check(plan.bytes() > 0, "an empty plan");
  }
  std::ranges::nth_element(us, us.begin() + 50);
  return us[50];
}

nlohmann::ordered_json Read(const Case& c, const Way& way, uint32_t max_sms,
                            const std::string& run_dir, Owner owner, int rounds) {
  Side reader(c, c.reader, 1, way.reader, way.transport, max_sms, run_dir);
  const BlockTable blocks = TakeBlocks(c, reader.pool, 2);
  for (std::vector<std::byte>& bytes : reader.host) std::ranges::fill(bytes, std::byte{0xff});
  reader.ToPlace();
  const Pulled first = ClaimedLoad(reader, owner, blocks).Pull();
  const uint64_t bytes = first.bytes;
  reader.FromPlace();
  reader.ForEachRow(blocks.blocks(), c.tokens, [](const std::byte* row, const RowName& name) {
    Check(name.Fills(row, kRowBytes), "wrong bytes");
  });
  BigCopy floor(way.owner, way.reader, bytes);
  std::vector<double> pull_us;   // one after the other
  std::vector<double> pause_us;  // after a pause
  std::vector<double> copy_us;
  for (int round = -2; round < rounds; ++round) {
    std::deque<ClaimedLoad> loads;
    for (uint32_t i = 0; i < 1 + kInARow; ++i) loads.emplace_back(reader, owner, blocks);
    std::this_thread::sleep_for(std::chrono::milliseconds(20));  // all are claimed
    const double copy = floor.Us();
    std::this_thread::sleep_for(std::chrono::milliseconds(3));
    const double pause = loads[0].Pull().us;
    if (round >= 0) copy_us.push_back(copy);
    if (round >= 0) pause_us.push_back(pause);
    for (uint32_t i = 1; i <= kInARow; ++i) {
      const double pull = loads[i].Pull().us;
      if (round >= 0) pull_us.push_back(pull);
    }
  }
  const Spread pull(pull_us);
  const Spread after_pause(pause_us);
  const Spread copy(copy_us);
  const double plan_us = PlanUs(c, reader, blocks);
  const auto rate = [&](double us) { return static_cast<double>(bytes) / us / 1e3; };
  std::printf(
      "%-18s %s to %s by %s %3u SMs %8.2f MB | plan us %5.1f | copy us %8.1f %6.1f GB/s | pull us "
      "%8.1f (%.1f, %.1f) "
      "%6.1f GB/s, ratio %.3f | after a pause %8.1f (%.1f, %.1f), ratio %.3f\n",
      c.name, NameOf(way.owner).c_str(), NameOf(way.reader).c_str(), first.path.c_str(), max_sms,
      static_cast<double>(bytes) / 1e6, plan_us, copy.median, rate(copy.median), pull.median,
      pull.min, pull.max, rate(pull.median), copy.median / pull.median, after_pause.median,
      after_pause.min, after_pause.max, copy.median / after_pause.median);
  std::fflush(stdout);
  return {{"case", c.name},
          {"layers", c.layers},
          {"tokens", c.tokens},
          {"owner_tp", c.owner_tp},
          {"owner", NameOf(way.owner)},
          {"reader", NameOf(way.reader)},
          {"path", first.path},
          {"max_sms", max_sms},
          {"shuffled", c.shuffled},
          {"bytes", bytes},
          {"plan_us", plan_us},
          {"copy_us", copy.json()},
          {"pull_us", pull.json()},
          {"pull_after_pause_us", after_pause.json()},
          {"ratio_of_medians", copy.median / pull.median}};
}

// The case in two new processes: this one never touches a GPU. Its JSON.
std::string Measure(const Case& c, const Way& way, uint32_t max_sms, const std::string& run_dir,
                    int rounds) {
  int tickets[2];
  int result[2];
  Check(socketpair(AF_UNIX, SOCK_SEQPACKET, 0, tickets) == 0 && pipe(result) == 0, "no sockets");
  const auto start = [&](auto&& body) {
    std::fflush(stdout);
    const pid_t pid = fork();
    Check(pid >= 0, "cannot fork");
    if (pid != 0) return pid;
    prctl(PR_SET_PDEATHSIG, SIGKILL);
    body();
    _exit(0);
  };
  const pid_t owner = start([&] {
    close(tickets[0]);
    Own(c, way, run_dir + "/owner", tickets[1]);
  });
  const pid_t reader = start([&] {
    close(tickets[1]);
    const std::string text =
        Read(c, way, max_sms, run_dir + "/reader", Owner(tickets[0]), rounds).dump();
    Check(write(result[1], text.data(), text.size()) == static_cast<ssize_t>(text.size()), "pipe");
  });
  close(tickets[0]);
  close(tickets[1]);
  close(result[1]);
  std::string text(64 << 10, '\0');
  const ssize_t n = read(result[0], text.data(), text.size());
  close(result[0]);
  int status = 0;
  waitpid(reader, &status, 0);
  kill(owner, SIGKILL);
  waitpid(owner, nullptr, 0);
  Check(n > 0 && status == 0, std::string(c.name) + " failed");
  text.resize(static_cast<size_t>(n));
  return text;
}

int VisibleGpus() {
  int ends[2];
  Check(pipe(ends) == 0, "no pipe");
  const pid_t child = fork();
  if (child == 0) {
    int count = 0;
    int peer = 0;
    if (cudaGetDeviceCount(&count) != cudaSuccess) count = 0;
    if (count > 1) cudaDeviceCanAccessPeer(&peer, 1, 0);
    const int usable = count > 1 && peer != 0 ? 2 : std::min(count, 1);
    _exit(write(ends[1], &usable, sizeof(usable)) == sizeof(usable) ? 0 : 1);
  }
  int usable = 0;
  Check(read(ends[0], &usable, sizeof(usable)) == sizeof(usable), "cannot look for GPUs");
  waitpid(child, nullptr, 0);
  return usable;
}

int Main(int argc, char** argv) {
  std::string json_file;
  int rounds = 21;
  bool only_crossed = false;
  for (int i = 1; i < argc; ++i) {
    const std::string arg = argv[i];
    if (arg.starts_with("--json=")) {
      json_file = arg.substr(7);
    } else if (arg.starts_with("--rounds=")) {
      rounds = std::max(1, std::atoi(arg.c_str() + 9));
    } else if (arg == "--crossed") {
      only_crossed = true;
    } else {
      std::fprintf(stderr, "usage: bench_pull_cuda [--json=FILE] [--rounds=N] [--crossed]\n");
      return 2;
    }
  }
  const int gpus = VisibleGpus();
  if (gpus == 0) {
    std::printf("no GPU here: nothing to measure\n");
    return 0;
  }
  std::string folder = (std::filesystem::temp_directory_path() / "kvrelay-pull-XXXXXX").string();
  Check(mkdtemp(folder.data()) != nullptr, "no temporary folder");
  auto rows = nlohmann::ordered_json::array();
  for (int gpu = 0; gpu < gpus && !only_crossed; ++gpu) {
    for (const Case& c : kCases) {
      for (const uint32_t sms : gpu == 0 ? std::vector{16U, 64U} : std::vector{8U, 16U, 32U}) {
        rows.push_back(nlohmann::ordered_json::parse(Measure(c, {0, gpu}, sms, folder, rounds)));
      }
    }
  }
  for (const Way& way : kCrossings) {
    for (const Case& c : kCrossed) {
      rows.push_back(nlohmann::ordered_json::parse(Measure(c, way, 16, folder, rounds)));
    }
  }
  std::filesystem::remove_all(folder);
  if (json_file.empty()) return 0;
  std::ofstream file(json_file);
  file << nlohmann::ordered_json{{"benchmark", "pull_cuda"}, {"rounds", rounds}, {"rows", rows}}
              .dump(2)
       << "\n";
  Check(file.flush().good(), "cannot write " + json_file);
  return 0;
}

}  // namespace
}  // namespace kvrelay::bench

int main(int argc, char** argv) { return kvrelay::bench::Main(argc, argv); }
