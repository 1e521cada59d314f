// kvrelay bench control: what the control plane carries: many owners, many leases, many pulls at
// once, in two processes on this machine.
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <condition_variable>
#include <deque>
#include <fstream>
#include <memory>
#include <mutex>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "proto/ticket.h"
#include "tools/common/output.h"
#include "tools/common/start.h"
#include "tools/common/table.h"
#include "tools/kvrelay/bench/bench.h"
#include "tools/kvrelay/bench/channel.h"
#include "tools/kvrelay/bench/engine_side.h"
#include "tools/kvrelay/bench/spread.h"

namespace kvrelay::tools {
namespace {

using std::chrono::steady_clock;

struct ControlOptions {
  uint32_t owners = 64;
  uint32_t leases = 10'000;
  uint32_t pulls = 1000;
  bool json = false;

  // All owners have as many.
  uint32_t leases_each() const { return (leases + owners - 1) / owners; }
};

double SecondsSince(TimePoint start) {
  return std::chrono::duration<double>(steady_clock::now() - start).count();
}

uint64_t ResidentBytes() {
  std::ifstream file("/proc/self/statm");
  uint64_t pages = 0;
  uint64_t resident = 0;
  file >> pages >> resident;
  return resident * static_cast<uint64_t>(::sysconf(_SC_PAGESIZE));
}

// What the owners' process tells before its tickets.
struct OwnersReport {
  double start_seconds = 0;  // of all agents
  double offer_seconds = 0;  // of all leases, one owner after the other
  uint64_t lease_bytes = 0;  // resident, of all leases
  uint64_t tickets = 0;
};

Status RunOwners(Channel& reader, const ControlOptions& options, const std::string& folder) {
  OwnersReport report;
  TimePoint start = steady_clock::now();
  std::vector<std::unique_ptr<EngineSide>> owners;
  for (uint32_t i = 0; i < options.owners; ++i) {
    KVRELAY_ASSIGN_OR_RETURN(
        owners.emplace_back(),
        EngineSide::Create(folder + "/owners", options.leases_each(), nullptr));
  }
  report.start_seconds = SecondsSince(start);
  const uint64_t before = ResidentBytes();
  start = steady_clock::now();
  std::vector<std::string> tickets;
  for (const auto& owner : owners) {
    KVRELAY_ASSIGN_OR_RETURN(const auto offered, owner->Offer(options.leases_each()));
    for (const proto::Ticket& ticket : offered) tickets.push_back(proto::EncodeTicket(ticket));
  }
  report.offer_seconds = SecondsSince(start);
  report.lease_bytes = ResidentBytes() - std::min(before, ResidentBytes());
  report.tickets = tickets.size();
  KVRELAY_RETURN_IF_ERROR(reader.Send(report));
  for (const std::string& ticket : tickets) KVRELAY_RETURN_IF_ERROR(reader.SendText(ticket));
  char end = 0;
  return reader.Receive(end);
}

struct Pulled {
  std::vector<double> ms;  // from asking to the KV here, each
  double seconds = 0;      // all
};

// Pulls many tickets, some at a time. Kept by its callbacks.
class PullAll : public std::enable_shared_from_this<PullAll> {
 public:
  PullAll(EngineSide& reader, std::deque<proto::Ticket> tickets)
      : reader_(reader), waiting_(std::move(tickets)), left_(waiting_.size()) {}

  // When all have ended; the first failure, if there was one.
  Result<Pulled> Run(uint32_t at_once) {
    const TimePoint start = steady_clock::now();
    reader_.agent().Post([self = shared_from_this(), at_once] {
      for (uint32_t i = 0; i < at_once; ++i) self->Next();
    });
    std::unique_lock lock(mutex_);
    if (!done_.wait_for(lock, std::chrono::minutes(2), [&] { return left_ == 0; })) {
      return Error(Code::kDeadlineExceeded, std::to_string(left_) + " pulls are not over yet");
    }
    if (!failure_.ok()) return Error(failure_);
    pulled_.seconds = SecondsSince(start);
    return pulled_;
  }

 private:
  void Next() {
    if (waiting_.empty()) return;
    const proto::Ticket ticket = std::move(waiting_.front());
    waiting_.pop_front();
    const TimePoint asked = steady_clock::now();
    reader_.Load(ticket, [self = shared_from_this(), asked](const auto& result) {
      self->OnEnd(1e3 * SecondsSince(asked), result.has_value() ? Status() : result.error());
      self->Next();
    });
  }
  void OnEnd(double ms, const Status& status) {
    const std::lock_guard lock(mutex_);
    pulled_.ms.push_back(ms);
    if (failure_.ok()) failure_ = status;
    if (--left_ == 0) done_.notify_one();
  }

  EngineSide& reader_;
  std::deque<proto::Ticket> waiting_;  // control thread
  std::mutex mutex_;
  std::condition_variable done_;
  // Under the mutex.
  size_t left_;
  Pulled pulled_;
  Status failure_;
};

std::string Report(const ControlOptions& options, const OwnersReport& owners,
                   const Pulled& handshakes, const Pulled& pulls) {
  const auto rate = [](size_t count, double seconds) {
    return static_cast<double>(count) / seconds;
  };
  const nlohmann::ordered_json json = {
      {"schema", 1},
      {"benchmark", "control"},
      {"machine", MachineJson()},
      {"owners", options.owners},
      {"leases", owners.tickets},
      {"concurrent_pulls", options.pulls},
      {"agents_started_per_s", rate(options.owners, owners.start_seconds)},
      {"offers_per_s", rate(owners.tickets, owners.offer_seconds)},
      {"owner_bytes_per_lease",
       static_cast<double>(owners.lease_bytes) / static_cast<double>(owners.tickets)},
      {"handshakes_per_s", rate(handshakes.ms.size(), handshakes.seconds)},
      {"handshake_p50_ms", Percentile(handshakes.ms, 0.5)},
      {"handshake_p99_ms", Percentile(handshakes.ms, 0.99)},
      {"pulls_per_s", rate(pulls.ms.size(), pulls.seconds)},
      {"pull_p50_ms", Percentile(pulls.ms, 0.5)},
      {"pull_p99_ms", Percentile(pulls.ms, 0.99)}};
  if (options.json) return json.dump(1) + "\n";
  Table table({"what", ">value"});
  for (const auto& [name, value] : json.items()) {
    if (value.is_number()) table.Row({name, FormatNumber(value.get<double>())});
  }
  return table.Text("");
}

Result<std::string> Bench(const ControlOptions& options, const std::string& folder) {
  KVRELAY_ASSIGN_OR_RETURN(Beside owners_process, Beside::Start([&](Channel& reader) {
                             return RunOwners(reader, options, folder);
                           }));
  KVRELAY_ASSIGN_OR_RETURN(
      const auto reader,
      EngineSide::Create(folder + "/reader", std::max(options.pulls, options.owners), nullptr));
  OwnersReport owners;
  KVRELAY_RETURN_IF_ERROR(owners_process.channel().Receive(owners));
  // One of each owner for the handshakes; the others by turns of the owners.
  std::deque<proto::Ticket> first;
  std::vector<std::deque<proto::Ticket>> by_owner(options.owners);
  for (uint64_t i = 0; i < owners.tickets; ++i) {
    std::string text;
    KVRELAY_RETURN_IF_ERROR(owners_process.channel().ReceiveText(text));
    KVRELAY_ASSIGN_OR_RETURN(proto::Ticket ticket, proto::DecodeTicket(text));
    by_owner[i / options.leases_each()].push_back(std::move(ticket));
  }
  std::deque<proto::Ticket> rest;
  for (size_t turn = 0; turn < by_owner.front().size(); ++turn) {
    for (auto& tickets : by_owner) (turn == 0 ? first : rest).push_back(std::move(tickets[turn]));
  }
  KVRELAY_ASSIGN_OR_RETURN(
      const Pulled handshakes,
      std::make_shared<PullAll>(*reader, std::move(first))->Run(options.owners));
  KVRELAY_ASSIGN_OR_RETURN(const Pulled pulls,
                           std::make_shared<PullAll>(*reader, std::move(rest))->Run(options.pulls));
  return Report(options, owners, handshakes, pulls);
}

}  // namespace

int BenchControlCommand(CommandArgs args) {
  ControlOptions options;
  FlagSet flags("kvrelay bench control [flags]",
                "Leases of many owners' agents, all offered, pulled by one reader's agent.",
                "kvrelay bench control --owners=8 --leases=1000 --pulls=100");
  flags.Whole("owners", &options.owners, 1, 256, "agents in the owners' process");
  flags.Whole("leases", &options.leases, 2, 1'000'000, "of all owners together, 4 KiB each");
  flags.Whole("pulls", &options.pulls, 1, 4096, "at once");
  flags.Switch("json", &options.json, "one object on stdout");
  if (const auto done = ParseOrFinish(flags, args)) return *done;
  if (options.leases_each() < 2) {
    return FailUsage(flags,
                     {Code::kInvalidArgument, "--leases=" + std::to_string(options.leases) +
                                                  " is less than two for each of --owners=" +
                                                  std::to_string(options.owners)},
                     options.json);
  }
  return InTemporaryFolder(flags.program(), options.json,
                           [&](const std::string& folder) { return Bench(options, folder); });
}

}  // namespace kvrelay::tools
