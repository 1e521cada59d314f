// Pulls between two processes on one host, by each transport, beside memcpy, a plain TCP socket and
// bare UCX: GB/s (10^9 bytes of payload a second, from the call to its completion).
//
//   bench_transport [--mib=1,16,64] [--slice_kib=4,64] [--rounds=11] [--rails=N] [--json=FILE]
//
// Slices lie scattered on both sides and cannot merge. memcpy copies the same slices inside the
// reader on one thread; the socket carries as many bytes from one buffer into another; ucx-get!bare
// reads the same slices in a loop of nothing else, ucx-am!bare sends as many bytes in messages as
// large as ucx-packed's, which nobody packs or unpacks. Each round runs all of them, in an order
// that changes from round to round. Where nothing reads one-sided the two columns of ucx-get are 0.
#include <netinet/in.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <cinttypes>
#include <condition_variable>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <iostream>
#include <map>
#include <mutex>
#include <optional>
#include <sstream>
#include <string>
#include <string_view>
#include <vector>

#include "base/random.h"
#include "kvcache/region.h"
#include "tools/bench/bare_ucx.h"
#include "tools/bench/pull_plans.h"
#include "tools/bench/two_processes.h"
#include "transport/transport.h"
#include "transport/ucx_one_sided.h"
#include "transport/ucx_version.h"

namespace kvrelay::transport {
namespace {

constexpr uint64_t kChunkBytes = 256 << 10;
using namespace bench;  // NOLINT(google-build-using-namespace)

enum Way : size_t { kMemcpy, kTcp, kMapped, kBareGet, kGet, kBareAm, kPacked, kZmq, kWayCount };
constexpr const char* kWays[] = {"memcpy",  "tcp",         "mapped",     "ucx-get!bare",
                                 "ucx-get", "ucx-am!bare", "ucx-packed", "zmq-packed"};
static_assert(std::size(kWays) == kWayCount);
constexpr uint32_t kBareWindow = 32;

struct Settings {
  std::vector<uint64_t> mib = {1, 16, 64};
  std::vector<uint64_t> slice_kib = {4, 64};
  int rounds = 11;
  uint32_t rails = 0;
  std::string json;

  uint64_t region_bytes() const { return 2 * *std::ranges::max_element(mib) << 20; }
};

// One process: its memory, its transports, and a control thread that is whoever waits.
struct Process {
  Process(const std::string& run_dir, uint64_t bytes, int fill, uint32_t rails)
      : kv(Must(Region::AllocateHost(bytes, "bench-kv"))),
        records(Must(Region::AllocateHost(4096, "bench-records"))) {
    std::memset(kv.data(), fill, bytes);
    Options options;
    for (const Region* region : {&kv, &records}) {
      options.regions.push_back(transport::LocalRegion::Of(*region));
    }
    options.executor = [this](std::function<void()> closure) {
      {
        const std::lock_guard lock(mutex);
        closures.push_back(std::move(closure));
      }
      wake.notify_one();
    };
    options.run_dir = run_dir;
    options.incarnation = incarnation;
    options.chunk_bytes = kChunkBytes;
    options.rails = rails;
    mapped = Must(CreateMapped(options));
    packed = Must(CreateUcxPacked(options));
    zmq = Must(CreateZmqPacked(options));
    if (FindOneSidedLanes("").has_value()) {
      get = Must(CreateUcxGet(options));
      bare_get.emplace(UCP_FEATURE_RMA, bench::BareGetSettings());
    }
    bare_am.emplace(UCP_FEATURE_AM, bench::BareAmSettings(kChunkBytes));
  }

  void RunUntil(const std::function<bool()>& done) {
    std::vector<std::function<void()>> batch;
    while (!done()) {
      {
        std::unique_lock lock(mutex);
        wake.wait(lock, [this] { return !closures.empty(); });
        batch.swap(closures);
      }
      for (auto& closure : batch) closure();
      batch.clear();
    }
  }

  PeerSpec Spec(const Transport& transport) const {
    return {"peer", transport.LocalAddress(), {kv.bytes(), records.bytes()}, incarnation};
  }

  Region kv;
  Region records;
  const Incarnation incarnation = RandomIncarnation();
  std::mutex mutex;
  std::vector<std::function<void()>> closures;  // under mutex
  std::condition_variable wake;
  std::unique_ptr<Transport> mapped;
  std::unique_ptr<Transport> packed;
  std::unique_ptr<Transport> zmq;
  std::unique_ptr<Transport> get;  // or null, together with
  std::optional<BareUcx> bare_get;
  std::optional<BareUcx> bare_am;
};

// What the reader asks the owner to do: 'p' packs and sends a stream over UCX,
// 'z' one over ZeroMQ, 't' writes to the TCP socket,
// 'a' sends bare messages, 'g' helps the bare reads to connect.
struct Request {
  char kind = 'q';
  uint64_t stream = 0;
  uint64_t slice = 0;
  uint64_t bytes = 0;
};

constexpr uint64_t kEpoch = 7;
constexpr uint64_t kHash = 9;

GuardExpectation Lease(Incarnation incarnation) { return {kEpoch, incarnation, kHash, 1}; }

void ProgressUntilTold(BareUcx& ucx, int control_fd) {
  char done = 0;
  while (recv(control_fd, &done, 1, MSG_DONTWAIT) != 1) ucx.Progress();
}

int Owner(const Settings& settings, const std::string& run_dir, int control_fd, int tcp_fd) {
  prctl(PR_SET_PDEATHSIG, SIGKILL);
  Process self(run_dir, settings.region_bytes(), 1, settings.rails);
  auto* record = reinterpret_cast<LeaseRecord*>(self.records.data());
  record->Start(kEpoch, self.incarnation, kHash);
  record->Publish({.tokens = 1, .chunk_end = 1, .layers = 0});
  SendSpec(control_fd, self.Spec(*self.mapped));
  SendSpec(control_fd, self.Spec(*self.packed));
  SendSpec(control_fd, self.Spec(*self.zmq));
  if (self.get) {
    SendSpec(control_fd, self.Spec(*self.get));
    SendText(control_fd, self.bare_get->Address());
    SendText(control_fd, self.bare_get->Register({self.kv.data(), self.kv.bytes()}));
    const auto base = reinterpret_cast<uintptr_t>(self.kv.data());
    WriteAll(control_fd, &base, sizeof(base));
  }
  const PeerSpec reader = ReceiveSpec(control_fd);
  const PeerSpec zmq_reader = ReceiveSpec(control_fd);
  self.bare_am->Connect(ReceiveText(control_fd));
  std::vector<char> buffer(kChunkBytes, 2);
  std::map<std::pair<uint64_t, uint64_t>, StreamPlan> plans;  // made before the clock runs
  for (const uint64_t mib : settings.mib) {
    for (const uint64_t kib : settings.slice_kib) {
      const uint64_t slice = kib << 10;
      plans[{slice, mib << 20}] =
          StreamOf(Scatter(settings.region_bytes(), slice, mib << 20), slice, kChunkBytes, true);
    }
  }
  while (true) {
    Request request;
    ReadAll(control_fd, &request, sizeof(request));
    if (request.kind == 'q') return 0;
    if (request.kind == 't') {
      for (uint64_t left = request.bytes; left > 0;) {
        const uint64_t part = std::min<uint64_t>(left, buffer.size());
        WriteAll(tcp_fd, buffer.data(), part);
        left -= part;
      }
      continue;
    }
    if (request.kind == 'a') {
      for (uint64_t left = request.bytes; left > 0;) {
        const uint64_t part = std::min<uint64_t>(left, buffer.size());
        self.bare_am->Wait(kBareWindow - 1);
        self.bare_am->Send(std::as_bytes(std::span(buffer)).first(part));
        left -= part;
      }
      // A send is done when UCX has copied it; what the socket did not take yet needs progress.
      ProgressUntilTold(*self.bare_am, control_fd);
      continue;
    }
    if (request.kind == 'g') {
      ProgressUntilTold(*self.bare_get, control_fd);
      continue;
    }
    bool sent = false;
    const bool zmq = request.kind == 'z';
    (zmq ? self.zmq : self.packed)
        ->StartPackedSend(zmq ? zmq_reader : reader, request.stream,
                          plans.at({request.slice, request.bytes}), record, Lease(self.incarnation),
                          std::chrono::steady_clock::now() + std::chrono::seconds(60),
                          [&](const Completion& done) {
                            Check(done.status.ok(), done.status.ToString());
                            sent = true;
                          });
    self.RunUntil([&] { return sent; });
  }
}

struct Row {
  uint64_t mib = 0;
  uint64_t slice = 0;
  Rates rates[kWayCount];
};

class Reader {
 public:
  Reader(const Settings& settings, const std::string& run_dir, int control_fd, int tcp_fd)
      : settings_(settings),
        control_fd_(control_fd),
        tcp_fd_(tcp_fd),
        self_(run_dir, settings.region_bytes(), 3, settings.rails),
        local_(Must(Region::AllocateHost(settings.region_bytes(), "bench-local"))),
        buffer_(kChunkBytes) {
    std::memset(local_.data(), 1, local_.bytes());
    const PeerSpec mapped = ReceiveSpec(control_fd);
    const PeerSpec packed = ReceiveSpec(control_fd);
    const PeerSpec zmq = ReceiveSpec(control_fd);
    owner_ = packed.incarnation;
    PeerSpec get;
    std::string bare_address;
    std::string bare_key;
    if (self_.get) {
      get = ReceiveSpec(control_fd);
      bare_address = ReceiveText(control_fd);
      bare_key = ReceiveText(control_fd);
      ReadAll(control_fd, &bare_base_, sizeof(bare_base_));
    }
    SendSpec(control_fd, self_.Spec(*self_.packed));
    SendSpec(control_fd, self_.Spec(*self_.zmq));
    self_.bare_am->Receive();
    SendText(control_fd, self_.bare_am->Address());
    mapped_ = Connect(*self_.mapped, mapped, connect_ms_[kMapped]);
    packed_ = Connect(*self_.packed, packed, connect_ms_[kPacked]);
    zmq_ = Connect(*self_.zmq, zmq, connect_ms_[kZmq]);
    if (self_.get) {
      get_ = Connect(*self_.get, get, connect_ms_[kGet]);
      ConnectBare(bare_address, bare_key);
    }
    std::printf(
        "connect: mapped %.2f ms, ucx-get %.2f ms, ucx-packed %.2f ms, zmq-packed %.2f ms\n",
        connect_ms_[kMapped], connect_ms_[kGet], connect_ms_[kPacked], connect_ms_[kZmq]);
  }

  Row Measure(uint64_t mib, uint64_t slice) {
    const std::vector<BlockPair> pairs = Scatter(settings_.region_bytes(), slice, mib << 20);
    std::vector<double> values[kWayCount];
    for (int round = -2; round < settings_.rounds; ++round) {
      for (size_t i = 0; i < kWayCount; ++i) {
        const Way way{(i + static_cast<size_t>(round + 2)) % kWayCount};
        if (!self_.get && (way == kGet || way == kBareGet)) continue;
        const double rate = static_cast<double>(mib << 20) / Run(way, pairs, slice) / 1e9;
        if (round >= 0) values[way].push_back(rate);  // the first ones touch memory
      }
    }
    Row row{.mib = mib, .slice = slice, .rates = {}};
    for (size_t way = 0; way < kWayCount; ++way) row.rates[way] = Summarise(values[way]);
    return row;
  }

  const double* connect_ms() const { return connect_ms_; }

 private:
  PeerHandle Connect(Transport& transport, const PeerSpec& spec, double& ms) {
    std::optional<Result<PeerHandle>> result;
    const auto start = std::chrono::steady_clock::now();
    transport.Connect(
        spec, start + std::chrono::seconds(10),
        [&](Result<PeerHandle> r) { result = std::move(r); },
        [] { Check(false, "the owner has died"); });
    self_.RunUntil([&] { return result.has_value(); });
    ms = Seconds(start) * 1e3;
    return Must(std::move(*result));
  }

  void ConnectBare(const std::string& address, const std::string& key) {
    self_.bare_get->Connect(address);
    self_.bare_get->UseKey(key);
    (void)self_.bare_get->Register({self_.kv.data(), self_.kv.bytes()});
    const Request request{'g', 0, 0, 0};
    WriteAll(control_fd_, &request, sizeof(request));
    self_.bare_get->Get({self_.kv.data(), 64}, bare_base_);
    self_.bare_get->Wait(0);
    WriteAll(control_fd_, "!", 1);
  }

  // Seconds that it took.
  double Run(Way way, const std::vector<BlockPair>& pairs, uint64_t slice) {
    const uint64_t bytes = pairs.size() * slice;
    CopyPlan plan = PlanOf(pairs, slice);
    StreamPlan stream = StreamOf(pairs, slice, kChunkBytes, false);
    const auto start = std::chrono::steady_clock::now();
    bool finished = false;
    const auto done = [&](const Completion& completion) {
      Check(completion.status.ok(), completion.status.ToString());
      Check(completion.bytes == bytes, "bytes are missing");
      finished = true;
    };
    switch (way) {
      case kMemcpy:
        for (const BlockPair& pair : pairs) {
          std::memcpy(self_.kv.data() + pair.dst * slice, local_.data() + pair.src * slice, slice);
        }
        break;
      case kTcp: {
        const Request request{'t', 0, slice, bytes};
        WriteAll(control_fd_, &request, sizeof(request));
        for (uint64_t left = bytes; left > 0;) {
          const uint64_t part = std::min<uint64_t>(left, buffer_.size());
          ReadAll(tcp_fd_, buffer_.data(), part);
          left -= part;
        }
        break;
      }
      case kMapped:
        self_.mapped->Read(mapped_, Whole(std::move(plan)), {1, 0},
                           start + std::chrono::seconds(60), done);
        self_.RunUntil([&] { return finished; });
        break;
      case kPacked:
      case kZmq: {
        const bool zmq = way == kZmq;
        const Request request{zmq ? 'z' : 'p', ++stream_, slice, bytes};
        (zmq ? self_.zmq : self_.packed)
            ->StartPackedReceive(zmq ? zmq_ : packed_, stream_, std::move(stream), Lease(owner_),
                                 start + std::chrono::seconds(60), done);
        WriteAll(control_fd_, &request, sizeof(request));
        self_.RunUntil([&] { return finished; });
        break;
      }
      case kGet:
        self_.get->Read(get_, Whole(std::move(plan)), {1, 0}, start + std::chrono::seconds(60),
                        done);
        self_.RunUntil([&] { return finished; });
        break;
      case kBareGet:
        for (const BlockPair& pair : pairs) {
          self_.bare_get->Wait(kBareWindow - 1);
          self_.bare_get->Get({self_.kv.data() + pair.dst * slice, slice},
                              bare_base_ + pair.src * slice);
        }
        self_.bare_get->Wait(0);
        break;
      case kBareAm: {
        const Request request{'a', 0, slice, bytes};
        const uint64_t until = self_.bare_am->received() + bytes;
        WriteAll(control_fd_, &request, sizeof(request));
        while (self_.bare_am->received() < until) self_.bare_am->Progress();
        WriteAll(control_fd_, "!", 1);
        break;
      }
      case kWayCount:
        break;
    }
    return Seconds(start);
  }

  const Settings& settings_;
  const int control_fd_;
  const int tcp_fd_;
  Process self_;
  Region local_;
  std::vector<char> buffer_;
  Incarnation owner_ = 0;
  PeerHandle mapped_ = 0;
  PeerHandle packed_ = 0;
  PeerHandle zmq_ = 0;
  PeerHandle get_ = 0;
  uintptr_t bare_base_ = 0;
  double connect_ms_[kWayCount] = {};
  StreamId stream_ = 0;
};

std::string Json(const Settings& settings, const Reader& reader, const std::vector<Row>& rows) {
  std::ostringstream out;
  out << "{\"schema\":1,\"benchmark\":\"transport\",\"unit\":\"GB/s\",\"rounds\":"
      << settings.rounds << ",\"chunk_bytes\":" << kChunkBytes << ",\"ucx\":\"" << UcxVersion()
      << "\",\"connect_ms\":{\"mapped\":" << reader.connect_ms()[kMapped]
      << ",\"ucx-get\":" << reader.connect_ms()[kGet]
      << ",\"ucx-packed\":" << reader.connect_ms()[kPacked]
      << ",\"zmq-packed\":" << reader.connect_ms()[kZmq] << "},\"rows\":[";
  for (size_t i = 0; i < rows.size(); ++i) {
    out << (i == 0 ? "" : ",") << "\n{\"bytes\":" << (rows[i].mib << 20)
        << ",\"slice_bytes\":" << rows[i].slice;
    for (size_t way = 0; way < kWayCount; ++way) {
      const Rates& r = rows[i].rates[way];
      out << ",\"" << kWays[way] << "\":{\"min\":" << r.min << ",\"median\":" << r.median
          << ",\"max\":" << r.max << "}";
    }
    out << "}";
  }
  out << "]}\n";
  return out.str();
}

bool ParseList(const std::string& text, std::vector<uint64_t>& out) {
  out.clear();
  std::istringstream list(text);
  for (std::string one; std::getline(list, one, ',');) {
    out.push_back(std::strtoull(one.c_str(), nullptr, 10));
  }
  return !out.empty() &&
         std::ranges::all_of(out, [](uint64_t value) { return value >= 1 && value <= 1024; });
}

bool Parse(int argc, char** argv, Settings& settings) {
  for (int i = 1; i < argc; ++i) {
    const std::string_view arg = argv[i];
    const size_t equals = arg.find('=');
    if (equals == std::string_view::npos) return false;
    const std::string_view name = arg.substr(0, equals);
    const std::string value(arg.substr(equals + 1));
    if (name == "--mib") {
      if (!ParseList(value, settings.mib)) return false;
    } else if (name == "--slice_kib") {
      if (!ParseList(value, settings.slice_kib)) return false;
    } else if (name == "--rounds") {
      settings.rounds = std::atoi(value.c_str());
    } else if (name == "--rails") {
      settings.rails = static_cast<uint32_t>(std::atoi(value.c_str()));
    } else if (name == "--json") {
      settings.json = value;
    } else {
      return false;
    }
  }
  // A slice is part of one chunk, and chunks are whole slices.
  const bool slices_ok = std::ranges::all_of(
      settings.slice_kib, [](uint64_t kib) { return kChunkBytes % (kib << 10) == 0; });
  return settings.rounds >= 1 && slices_ok;
}

int Main(int argc, char** argv) {
  Settings settings;
  if (!Parse(argc, argv, settings)) {
    std::cerr << "usage: bench_transport [--mib=1,16,64] [--slice_kib=4,64] [--rounds=11] "
                 "[--rails=N] [--json=FILE]\n";
    return 2;
  }
  char run_dir[] = "/tmp/kvrelay-bench-XXXXXX";
  Check(mkdtemp(run_dir) != nullptr, "no folder in /tmp");
  int control[2];
  Check(socketpair(AF_UNIX, SOCK_STREAM, 0, control) == 0, "socketpair");
  const auto [owner_tcp, reader_tcp] = TcpPair();
  // Before UCX is used: it does not survive a fork.
  const pid_t owner = fork();
  if (owner == 0) {
    close(control[1]);
    _exit(Owner(settings, run_dir, control[0], owner_tcp));
  }
  close(control[0]);
  {
    Reader reader(settings, run_dir, control[1], reader_tcp);
    std::printf("%d rounds, GB/s min / median / max\n%6s %8s", settings.rounds, "MiB", "slice");
    for (const char* way : kWays) std::printf("   %-20s", way);
    std::printf("\n");
    std::vector<Row> rows;
    for (const uint64_t slice_kib : settings.slice_kib) {
      for (const uint64_t mib : settings.mib) {
        rows.push_back(reader.Measure(mib, slice_kib << 10));
        std::printf("%6" PRIu64 " %8" PRIu64, mib, slice_kib << 10);
        for (const Rates& r : rows.back().rates) {
          std::printf("   %5.2f %5.2f %5.2f   ", r.min, r.median, r.max);
        }
        std::printf("\n");
        std::fflush(stdout);
      }
    }
    if (!settings.json.empty()) {
      std::ofstream file(settings.json);
      file << Json(settings, reader, rows);
      Check(file.flush().good(), "cannot write " + settings.json);
    }
    const Request quit;
    WriteAll(control[1], &quit, sizeof(quit));
  }
  waitpid(owner, nullptr, 0);
  std::error_code ignored;
  std::filesystem::remove_all(run_dir, ignored);
  return 0;
}

}  // namespace
}  // namespace kvrelay::transport

int main(int argc, char** argv) { return kvrelay::transport::Main(argc, argv); }
