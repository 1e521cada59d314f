#include "tools/kvrelay/bench/pull_way.h"

#include <fcntl.h>
#include <sys/uio.h>
#include <unistd.h>

#include <array>
#include <atomic>
#include <cerrno>
#include <chrono>
#include <cstring>
#include <functional>
#include <optional>

#include "base/parallel.h"
#include "kvcache/copy_host.h"
#include "tools/common/scattered_copy.h"
#include "tools/kvrelay/bench/bare_get.h"
#include "tools/kvrelay/bench/bare_stream.h"

namespace kvrelay::tools {
namespace {

using std::chrono::steady_clock;

double SecondsSince(TimePoint start) {
  return std::chrono::duration<double>(steady_clock::now() - start).count();
}

// Ways whose slices land in our side's memory.
class LocalWay : public PullWay {
 public:
  LocalWay(std::string name, int threads, ReaderContext& context)
      : PullWay(std::move(name), threads), context_(context) {}
  Status Erase(const PullCase& pull) override {
    tools::Erase(pull, context_.side.memory());
    return {};
  }
  Result<bool> Holds(const PullCase& pull) override {
    return HoldsPattern(pull, context_.side.memory());
  }

 protected:
  ReaderContext& context_;
};

// A function that returns when the slices are there.
class CallWay final : public LocalWay {
 public:
  using Call = std::function<Status(const PullCase& pull)>;
  CallWay(std::string name, int threads, ReaderContext& context, Call call)
      : LocalWay(std::move(name), threads, context), call_(std::move(call)) {}

  Result<double> Pull(const PullCase& pull) override {
    SetParallelism(threads());
    const TimePoint start = steady_clock::now();
    KVRELAY_RETURN_IF_ERROR(call_(pull));
    return SecondsSince(start);
  }

 private:
  const Call call_;
};

// As many bytes as the slices have, which nobody gathers or scatters.
class StreamWay final : public LocalWay {
 public:
  using Receive = std::function<Status(uint64_t bytes)>;
  StreamWay(std::string name, OwnerRequest::Kind kind, ReaderContext& context, Receive receive)
      : LocalWay(std::move(name), 1, context), kind_(kind), receive_(std::move(receive)) {
    copies_bytes_ = false;
  }

  Result<double> Pull(const PullCase& pull) override {
    const OwnerRequest request{.kind = kind_, .bytes = pull.bytes()};
    const TimePoint start = steady_clock::now();
    KVRELAY_RETURN_IF_ERROR(context_.owner.Send(request));
    char ready = 0;
    KVRELAY_RETURN_IF_ERROR(context_.owner.Receive(ready));
    KVRELAY_RETURN_IF_ERROR(receive_(pull.bytes()));
    return SecondsSince(start);
  }

 private:
  const OwnerRequest::Kind kind_;
  const Receive receive_;
};

// A transport to the owner that has connected.
struct Connection {
  transport::Transport& transport;
  transport::PeerHandle peer = 0;
  Incarnation owner = 0;

  GuardExpectation lease() const { return Side::LeaseOf(owner); }
};

// Seconds that all reads together took, from plans that are given away.
Result<double> ReadPlans(Side& side, const Connection& to, const std::vector<CopyPlan>& plans) {
  std::vector<transport::NextPortion> reads;
  reads.reserve(plans.size());
  for (const CopyPlan& plan : plans) reads.push_back(transport::Whole(plan));
  std::vector<transport::Completion> completions;
  const TimePoint start = steady_clock::now();
  for (transport::NextPortion& read : reads) {
    to.transport.Read(
        to.peer, std::move(read), Side::guard(), start + std::chrono::seconds(50),
        [&](const transport::Completion& completion) { completions.push_back(completion); });
  }
  KVRELAY_RETURN_IF_ERROR(side.RunUntil([&] { return completions.size() == plans.size(); }));
  const double seconds = SecondsSince(start);
  for (const transport::Completion& completion : completions) {
    KVRELAY_RETURN_IF_ERROR(completion.status);
    if (!GuardHolds(to.lease(), completion.before, completion.after)) {
      return Error(Code::kStaleRead, "the lease did not hold");
    }
  }
  return seconds;
}

Result<transport::PeerHandle> Connect(Side& side, transport::Transport& transport,
                                      const transport::PeerSpec& owner) {
  std::optional<Result<transport::PeerHandle>> peer;
  transport.Connect(
      owner, steady_clock::now() + std::chrono::seconds(10),
      [&](Result<transport::PeerHandle> handle) { peer = std::move(handle); }, [] {});
  KVRELAY_RETURN_IF_ERROR(side.RunUntil([&] { return peer.has_value(); }));
  return *std::move(peer);
}

Result<double> ConnectAndRead(Side& side, transport::Transport& transport,
                              const transport::PeerSpec& owner) {
  const std::vector<CopyPlan> plans = {PullCase::Make(side.kv().bytes(), 64, 0, 1).Plan()};
  const TimePoint start = steady_clock::now();
  KVRELAY_ASSIGN_OR_RETURN(const transport::PeerHandle peer, Connect(side, transport, owner));
  const Connection to{transport, peer, owner.incarnation};
  KVRELAY_ASSIGN_OR_RETURN([[maybe_unused]] const double read, ReadPlans(side, to, plans));
  const double seconds = SecondsSince(start);
  transport.Disconnect(peer);
  return seconds;
}

// A transport, whichever style it has.
class TransportWay final : public LocalWay {
 public:
  TransportWay(ReaderContext& context, uint32_t index, int threads, Connection to)
      : LocalWay(context.side.ways()[index].name, threads, context), index_(index), to_(to) {}

  bool remakes_case() const override { return !one_sided(); }
  Status Prepare(const PullCase& pull) override {
    if (one_sided()) {
      plans_ = {pull.Plan()};
      return {};
    }
    plan_ = pull.Stream(kBenchChunkBytes, /*pack=*/false);
    // Unique per process: every way has its number.
    static uint64_t streams = 0;
    stream_ = ++streams;
    KVRELAY_RETURN_IF_ERROR(context_.owner.Send(OwnerRequest{.kind = OwnerRequest::Kind::kPrepare,
                                                             .way = index_,
                                                             .stream = stream_,
                                                             .slice_bytes = pull.slice_bytes,
                                                             .set = pull.set,
                                                             .count = pull.count}));
    char ready = 0;
    return context_.owner.Receive(ready);
  }

  Result<double> Pull(const PullCase&) override {
    SetParallelism(threads());
    if (one_sided()) return ReadPlans(context_.side, to_, plans_);
    std::optional<Status> received;
    const TimePoint start = steady_clock::now();
    to_.transport.StartPackedReceive(
        to_.peer, stream_, plan_, to_.lease(), start + std::chrono::seconds(50),
        [&](const transport::Completion& completion) { received = completion.status; });
    KVRELAY_RETURN_IF_ERROR(context_.owner.Send(OwnerRequest{.kind = OwnerRequest::Kind::kStream}));
    char ready = 0;
    KVRELAY_RETURN_IF_ERROR(context_.owner.Receive(ready));
    KVRELAY_RETURN_IF_ERROR(context_.side.RunUntil([&] { return received.has_value(); }));
    const double seconds = SecondsSince(start);
    KVRELAY_RETURN_IF_ERROR(*received);
    return seconds;
  }

 private:
  bool one_sided() const { return to_.transport.style() == transport::Style::kOneSided; }

  const uint32_t index_;
  const Connection to_;
  std::vector<CopyPlan> plans_;  // one-sided: of the case that was prepared
  transport::StreamPlan plan_;   // packed
  uint64_t stream_ = 0;
};

Status ReadVm(const PullCase& pull, pid_t owner, uint64_t remote, std::byte* local) {
  constexpr size_t kBatch = 1024;  // IOV_MAX
  std::atomic<int> failure{0};
  ParallelFor(pull.slices.size(), kBatch, [&](size_t begin, size_t end) {
    std::array<iovec, kBatch> to;
    std::array<iovec, kBatch> from;
    for (size_t i = begin; i < end; ++i) {
      to[i - begin] = {local + pull.slices[i].dst, pull.slice_bytes};
      from[i - begin] = {reinterpret_cast<void*>(remote + pull.slices[i].src), pull.slice_bytes};
    }
    const auto want = static_cast<ssize_t>((end - begin) * pull.slice_bytes);
    const ssize_t got =
        ::process_vm_readv(owner, to.data(), end - begin, from.data(), end - begin, 0);
    if (got != want) failure = got < 0 ? errno : EIO;
  });
  if (failure == 0) return {};
  return {Code::kInternal, std::string("process_vm_readv: ") + std::strerror(failure)};
}

void AddNearWays(ReaderContext& context, const Connection& to,
                 const std::shared_ptr<MappedRegion>& mapped, PullWays& out) {
  Side& side = context.side;
  const CopyPlan probe = PullCase::Make(side.kv().bytes(), 64, 0, 1).Plan();
  if (!to.transport.ReadNow(to.peer, probe, Side::guard())) return;
  const std::string name(to.transport.name());
  out.near_ways.push_back(std::make_unique<CallWay>(
      name + ", copy alone", 1, context, [mapped, &side](const PullCase& pull) -> Status {
        const std::byte* const from = mapped->data();
        std::byte* const into = side.kv().data();
        ExecuteCopy(pull.Plan(), {&from, 1}, {&into, 1});
        return {};
      }));
  out.near_ways.push_back(std::make_unique<CallWay>(
      name + ", calling thread", 1, context, [to](const PullCase& pull) -> Status {
        const auto done = to.transport.ReadNow(to.peer, pull.Plan(), Side::guard());
        if (!done) return {Code::kPeerUnreachable, "the owner has ended"};
        KVRELAY_RETURN_IF_ERROR(done->status);
        if (GuardHolds(to.lease(), done->before, done->after)) return {};
        return {Code::kStaleRead, "the lease did not hold"};
      }));
}

}  // namespace

Result<PullWays> OpenWays(ReaderContext& context, pid_t owner, const std::vector<int>& threads) {
  PullWays out;
  Side& side = context.side;
  std::vector<transport::PeerSpec> owners;
  for (const Side::Way& way : side.ways()) {
    KVRELAY_RETURN_IF_ERROR(context.owner.ReceiveSpec(owners.emplace_back()));
    KVRELAY_RETURN_IF_ERROR(context.owner.SendSpec(side.Spec(way.transport.get())));
  }
  std::string invitation;
  KVRELAY_RETURN_IF_ERROR(context.owner.ReceiveText(invitation));
  auto receiver = BareReceiver::Create(kBenchChunkBytes);
  std::string address;
  if (receiver.has_value()) {
    KVRELAY_ASSIGN_OR_RETURN(address, (*receiver)->Address());
  }
  KVRELAY_RETURN_IF_ERROR(context.owner.SendText(address));
  int fd = -1;
  KVRELAY_RETURN_IF_ERROR(context.owner.Receive(fd));
  std::byte* remote = nullptr;
  KVRELAY_RETURN_IF_ERROR(context.owner.Receive(remote));
  const std::string file = "/proc/" + std::to_string(owner) + "/fd/" + std::to_string(fd);
  KVRELAY_ASSIGN_OR_RETURN(
      MappedRegion region,
      MappedRegion::Map(UniqueFd(::open(file.c_str(), O_RDONLY | O_CLOEXEC)), side.kv().bytes()));
  const auto mapped = std::make_shared<MappedRegion>(std::move(region));

  const auto add = [&](const std::string& name, int count, CallWay::Call call) {
    out.ways.push_back(std::make_unique<CallWay>(name, count, context, std::move(call)));
  };
  for (const int count : threads) {
    add("memcpy", count, [mapped, &side](const PullCase& pull) -> Status {
      CopySlices(pull.slices, pull.slice_bytes, mapped->data(), side.kv().data());
      return {};
    });
    add("best copy loop", count, [mapped, &side](const PullCase& pull) -> Status {
      StreamSlices(pull.slices, pull.slice_bytes, mapped->data(), side.kv().data());
      return {};
    });
    add("process_vm_readv", count, [=, &side](const PullCase& pull) {
      return ReadVm(pull, owner, reinterpret_cast<uint64_t>(remote), side.kv().data());
    });
  }
  for (uint32_t i = 0; i < side.ways().size(); ++i) {
    const Side::Way& way = side.ways()[i];
    if (way.transport == nullptr || owners[i].address.empty()) {
      out.refused.emplace_back(way.name, way.why);
      continue;
    }
    const auto peer = Connect(side, *way.transport, owners[i]);
    if (!peer.has_value()) {
      out.refused.emplace_back(way.name, peer.error().message());
      continue;
    }
    const Connection to{*way.transport, *peer, owners[i].incarnation};
    if (way.transport->style() == transport::Style::kOneSided) {
      AddNearWays(context, to, mapped, out);
      out.connects.emplace_back(way.name, [&side, to, spec = owners[i]] {
        return ConnectAndRead(side, to.transport, spec);
      });
    }
    if (!out.read_plans && way.transport->style() == transport::Style::kOneSided) {
      out.read_plans = [&side, to](const auto& plans) { return ReadPlans(side, to, plans); };
    }
    for (const int count : threads) {
      out.ways.push_back(std::make_unique<TransportWay>(context, i, count, to));
    }
  }
  auto bare = BareGet::Create(side.memory());
  Status status = bare.has_value() ? (*bare)->Connect(invitation) : bare.error();
  if (status.ok()) {
    const std::shared_ptr<BareGet> get = std::move(*bare);
    add("bare UCX GET", 1, [get](const PullCase& pull) { return get->Get(pull); });
  } else {
    out.refused.emplace_back("bare UCX GET", status.message());
  }
  if (receiver.has_value()) {
    const std::shared_ptr<BareReceiver> messages = std::move(*receiver);
    out.ways.push_back(
        std::make_unique<StreamWay>("bare UCX stream", OwnerRequest::Kind::kBareStream, context,
                                    [messages, &owner = context.owner](uint64_t bytes) -> Status {
                                      KVRELAY_RETURN_IF_ERROR(messages->Receive(bytes));
                                      return owner.Send('!');
                                    }));
  } else {
    out.refused.emplace_back("bare UCX stream", receiver.error().message());
  }
  const auto plain = std::make_shared<Channel>(std::move(context.socket));
  out.ways.push_back(std::make_unique<StreamWay>(
      "tcp socket", OwnerRequest::Kind::kSocket, context, [plain, &side](uint64_t bytes) -> Status {
        for (uint64_t left = bytes; left > 0;) {
          const uint64_t part = std::min(left, kBenchChunkBytes);
          KVRELAY_RETURN_IF_ERROR(plain->Read(side.kv().data(), part));
          left -= part;
        }
        return {};
      }));
  return out;
}

}  // namespace kvrelay::tools
