// What pulling while a prompt is computed is worth: the time from the last layer of a paced prefill
// to the KV complete in the reader, streaming (the pull follows the lease's progress) against not
// (it starts when the prefill says that it is done).
//
//   bench_overlap --help
//
// Owner and reader are two processes with whole agents between them; claims are made when the
// ticket comes, in both modes. The KV (8 heads of 128, bf16, blocks of 16 tokens) lies in the
// owner's memory from the start: computing is waiting `layer_us` for each layer of a chunk, then
// publishing it. Every round checks every byte.
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <csignal>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <future>
#include <memory>
#include <nlohmann/json.hpp>
#include <optional>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "agent/engine_agent.h"
#include "kvcache/kv_view.h"
#include "proto/ticket.h"
#include "tools/bench/engine_rows.h"
#include "tools/bench/program.h"
#include "tools/common/flags.h"

namespace kvrelay::agent {
namespace {

using bench::Check;
using bench::Must;
using bench::RowName;
using std::chrono::microseconds;
using std::chrono::steady_clock;

constexpr uint32_t kHeads = 8;
constexpr uint32_t kDim = 128;
constexpr uint32_t kBlockSize = 16;
constexpr uint64_t kRowBytes = kDim * 2;

struct Settings {
  std::vector<std::string> transports = {"mapped", "ucx-packed"};
  std::vector<uint32_t> tokens = {512, 2048};
  uint32_t chunk = 512;
  uint32_t layers = 32;
  uint32_t layer_us = 500;
  uint32_t tp = 2;
  uint32_t rounds = 9;
  std::string json;

  uint32_t blocks() const { return *std::ranges::max_element(tokens) / kBlockSize + 1; }
};

double MillisBetween(TimePoint from, TimePoint to) { return ToMillis(to - from); }

// One engine with its memory.
struct Side {
  Side(const Settings& settings, uint32_t tp, const std::string& transport,
       const std::string& run_dir)
      : pool(BlockPool::Create(settings.blocks())) {
    std::vector<RankCache> caches;
    for (uint32_t rank = 0; rank < tp; ++rank) {
      shards.push_back(Must(KvShard::Make(settings.layers, kHeads, tp, rank)));
      const KvLayout layout =
          KvLayout::Dense(KvFormat::kNhd, DType::kBf16, settings.layers, shards.back().head_count,
                          kDim, kBlockSize, settings.blocks());
      regions.push_back(std::make_unique<Region>(
          Must(Region::AllocateHost(layout.dense_bytes(), "bench-overlap"))));
      views.emplace_back(layout, std::vector<std::byte*>{regions.back()->data()});
      caches.push_back({layout, shards.back(), {regions.back().get()}});
    }
    EngineAgentOptions options;
    options.model.bytes[0] = 1;
    options.block_size = kBlockSize;
    options.transport = transport;
    options.run_dir = run_dir;
    agent = Must(EngineAgent::Create(options, caches, pool, prefixes));
    agent->Run();
  }
  ~Side() { agent->Shutdown(); }

  // visit(row, its name) for every row of `tokens` tokens.
  template <typename Visit>
  void ForEachRow(std::span<const BlockId> blocks, uint32_t tokens, Visit visit) {
    for (size_t rank = 0; rank < views.size(); ++rank) {
      bench::ForEachRow(views[rank], shards[rank], blocks, tokens, visit);
    }
  }

  std::shared_ptr<BlockPool> pool;
  SystemPrefixStore prefixes{1};
  std::vector<std::unique_ptr<Region>> regions;
  std::vector<KvView> views;
  std::vector<KvShard> shards;
  std::unique_ptr<EngineAgent> agent;
};

// Frames over a socket pair: the reader sends numbers of tokens, the owner tickets and times.
void Send(int fd, std::string_view bytes) {
  Check(send(fd, bytes.data(), bytes.size(), MSG_NOSIGNAL) == static_cast<ssize_t>(bytes.size()),
        "the other process has ended");
}

std::optional<std::string> Receive(int fd) {
  std::string bytes(64 << 10, '\0');
  const ssize_t n = recv(fd, bytes.data(), bytes.size(), 0);
  if (n <= 0) return std::nullopt;
  bytes.resize(static_cast<size_t>(n));
  return bytes;
}

std::string MustReceive(int fd) {
  auto bytes = Receive(fd);
  Check(bytes.has_value(), "the other process has ended");
  return *std::move(bytes);
}

// Computes `tokens` tokens at the pace and tells when the last layer was done.
TimePoint Prefill(const Settings& settings, const std::vector<std::shared_ptr<ProgressWriter>>& to,
                  uint32_t tokens) {
  TimePoint next = steady_clock::now();
  for (uint32_t begin = 0; begin < tokens; begin += settings.chunk) {
    const uint32_t end = std::min(tokens, begin + settings.chunk);
    for (uint32_t layer = 1; layer <= settings.layers; ++layer) {
      next += microseconds(settings.layer_us);
      std::this_thread::sleep_until(next);
      const Progress progress =
          layer < settings.layers ? Progress{begin, end, layer} : Progress{end, end, 0};
      for (const auto& writer : to) writer->Publish(progress);
    }
  }
  return steady_clock::now();
}

void Own(const Settings& settings, const std::string& transport, const std::string& run_dir,
         int fd) {
  Side side(settings, settings.tp, transport, run_dir);
  const BlockTable blocks = Must(side.pool->Allocate(settings.blocks() - 1));
  side.ForEachRow(blocks.blocks(), *std::ranges::max_element(settings.tokens),
                  [](std::byte* row, const RowName& name) { name.Fill(row, kRowBytes); });
  while (const auto command = Receive(fd)) {
    const auto tokens = static_cast<uint32_t>(std::stoul(*command));
    const LeaseId lease = bench::OfferAll(*side.agent, blocks, tokens);
    std::vector<std::shared_ptr<ProgressWriter>> writers;
    for (uint32_t rank = 0; rank < settings.tp; ++rank) {
      writers.push_back(side.agent->Writer(rank, lease));
    }
    Send(fd, proto::EncodeTicket(bench::TicketOf(*side.agent, lease, tokens)));
    const TimePoint done = Prefill(settings, writers, tokens);
    side.agent->Post([&side, lease] { side.agent->owner().MarkFinished(lease); });
    Send(fd, std::to_string(done.time_since_epoch().count()));
  }
}

struct Sample {
  double tail_ms = 0;  // last layer done -> KV complete
  uint64_t bytes = 0;
};

Sample RunOne(Side& reader, int owner, uint32_t tokens, bool streaming) {
  const BlockTable blocks = Must(reader.pool->Allocate((tokens + kBlockSize - 1) / kBlockSize));
  reader.ForEachRow(blocks.blocks(), tokens,
                    [](std::byte* row, const RowName&) { std::memset(row, 0xff, kRowBytes); });
  Send(owner, std::to_string(tokens));
  const proto::Ticket ticket = Must(proto::DecodeTicket(MustReceive(owner)));

  struct Ended {
    std::promise<std::pair<Result<LoadResult>, TimePoint>> finished;
    std::promise<void> drained;  // our blocks are nobody's but ours again
  };
  auto ended = std::make_shared<Ended>();
  std::weak_ptr<Load> load;
  bench::Await<bool>(*reader.agent, [&](const std::function<void(bool)>& started) {
    LoadRequest request{.ticket = ticket,
                        .blocks = {blocks.Share(), 0},
                        .deadline = steady_clock::now() + std::chrono::seconds(60)};
    load = reader.agent->StartLoad(
        std::move(request),
        {.finished =
             [ended](Result<LoadResult> result) {
               ended->finished.set_value({std::move(result), steady_clock::now()});
             },
         .drained = [ended] { ended->drained.set_value(); }});
    if (streaming) load.lock()->SetReady();
    started(true);
  });
  const TimePoint done{Duration(std::stoll(MustReceive(owner)))};
  if (!streaming) {
    reader.agent->Post([load] {
      if (const auto waiting = load.lock()) waiting->SetReady();
    });
  }
  auto drained = ended->drained.get_future();
  Check(drained.wait_for(std::chrono::seconds(60)) == std::future_status::ready,
        "no KV in a minute");
  auto [loaded, at] = ended->finished.get_future().get();
  const LoadResult result = Must(std::move(loaded));
  reader.ForEachRow(blocks.blocks(), tokens, [](const std::byte* row, const RowName& name) {
    Check(name.Fills(row, kRowBytes), "wrong bytes");
  });
  return {.tail_ms = std::max(0.0, MillisBetween(done, at)), .bytes = result.own.bytes};
}

struct Quantiles {
  explicit Quantiles(std::vector<double> values) {
    std::ranges::sort(values);
    min = values.front();
    median = values[values.size() / 2];
    max = values.back();
  }
  double min = 0;
  double median = 0;
  double max = 0;
  nlohmann::ordered_json json() const { return {{"min", min}, {"median", median}, {"max", max}}; }
};

nlohmann::ordered_json Measure(const Settings& settings, const std::string& transport,
                               const std::string& run_dir) {
  int sockets[2];
  Check(socketpair(AF_UNIX, SOCK_SEQPACKET, 0, sockets) == 0, "no socket pair");
  const pid_t owner = fork();
  Check(owner >= 0, "cannot fork");
  if (owner == 0) {
    prctl(PR_SET_PDEATHSIG, SIGKILL);
    close(sockets[0]);
    Own(settings, transport, run_dir + "/owner", sockets[1]);
    _exit(0);
  }
  close(sockets[1]);
  auto rows = nlohmann::ordered_json::array();
  {
    Side reader(settings, 1, transport, run_dir + "/reader");
    for (const uint32_t tokens : settings.tokens) {
      std::vector<double> streaming;
      std::vector<double> after;
      uint64_t bytes = 0;
      RunOne(reader, sockets[0], tokens, true);  // the handshake, and pages touched
      for (uint32_t round = 0; round < settings.rounds; ++round) {
        for (const bool first : {true, false}) {
          const bool stream = first == (round % 2 == 0);
          const Sample sample = RunOne(reader, sockets[0], tokens, stream);
          (stream ? streaming : after).push_back(sample.tail_ms);
          bytes = sample.bytes;
        }
        std::fprintf(stderr, "\r%s, %u tokens: round %u of %u ", transport.c_str(), tokens,
                     round + 1, settings.rounds);
      }
      std::fprintf(stderr, "\r\033[K");
      const Quantiles s(streaming);
      const Quantiles a(after);
      const uint32_t chunks = (tokens + settings.chunk - 1) / settings.chunk;
      std::printf(
          "%-11s %6u tokens %2u chunks %7.1f MB | after the prefill, ms: streaming %7.2f "
          "(%.2f, %.2f)  not %7.2f (%.2f, %.2f)  ratio %.2f\n",
          transport.c_str(), tokens, chunks, static_cast<double>(bytes) / 1e6, s.median, s.min,
          s.max, a.median, a.min, a.max, s.median / a.median);
      std::fflush(stdout);
      rows.push_back({{"transport", transport},
                      {"tokens", tokens},
                      {"chunks", chunks},
                      {"bytes", bytes},
                      {"streaming_ms", s.json()},
                      {"after_ms", a.json()},
                      {"ratio_of_medians", s.median / a.median}});
    }
  }
  close(sockets[0]);
  int status = 0;
  waitpid(owner, &status, 0);
  return rows;
}

std::optional<Settings> Parse(int argc, char** argv) {
  Settings settings;
  std::string transport;
  tools::FlagSet flags("bench_overlap [flags]",
                       "What pulling while a prompt is computed is worth: from the last layer of a "
                       "paced prefill to the KV complete in the reader.",
                       "bench_overlap --tokens=4096 --layer_us=1000 --json=overlap.json");
  flags.Ids("tokens", &settings.tokens, "Lengths of prompts.");
  flags.Whole("chunk", &settings.chunk, 16, 1 << 20, "Tokens computed at a time.");
  flags.Whole("layers", &settings.layers, 1, 256, "Layers of the model.");
  flags.Whole("layer_us", &settings.layer_us, 1, 1'000'000, "Microseconds for a layer of a chunk.");
  flags.Whole("tp", &settings.tp, 1, kHeads, "Ranks of the owner; the reader has one.");
  flags.Choice("transport", &transport, {"", "mapped", "ucx-packed"}, "One of them; empty: all.");
  flags.Whole("rounds", &settings.rounds, 1, 1000, "Pulls in each mode.");
  flags.Text("json", &settings.json, "FILE", "Also write the figures there.");
  if (!bench::ParseFlags(flags, argc, argv)) return std::nullopt;
  if (!transport.empty()) settings.transports = {transport};
  Check(!settings.tokens.empty(), "--tokens is empty");
  return settings;
}

int Main(int argc, char** argv) {
  const std::optional<Settings> parsed = Parse(argc, argv);
  if (!parsed) return 0;
  const Settings& settings = *parsed;
  std::string folder = (std::filesystem::temp_directory_path() / "kvrelay-bench-XXXXXX").string();
  Check(mkdtemp(folder.data()) != nullptr, "no temporary folder");
  nlohmann::ordered_json report = {{"benchmark", "overlap"},
                                   {"chunk_tokens", settings.chunk},
                                   {"layers", settings.layers},
                                   {"layer_us", settings.layer_us},
                                   {"owner_tp", settings.tp},
                                   {"rounds", settings.rounds},
                                   {"rows", nlohmann::ordered_json::array()}};
  for (const std::string& transport : settings.transports) {
    for (auto& row : Measure(settings, transport, folder)) report["rows"].push_back(std::move(row));
  }
  std::filesystem::remove_all(folder);
  bench::WriteReport(report, settings.json);
  return 0;
}

}  // namespace
}  // namespace kvrelay::agent

int main(int argc, char** argv) { return kvrelay::agent::Main(argc, argv); }
