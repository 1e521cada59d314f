#include "tools/kvrelay/bench/agent_pulls.h"

#include <chrono>
#include <condition_variable>
#include <future>
#include <mutex>
#include <nlohmann/json.hpp>
#include <optional>
#include <thread>
#include <utility>
#include <vector>

#include "proto/ticket.h"
#include "tools/kvrelay/bench/engine_side.h"
#include "tools/kvrelay/bench/spread.h"

namespace kvrelay::tools {
namespace {

using std::chrono::steady_clock;
using Json = nlohmann::ordered_json;

constexpr uint32_t kFirstOwners = 21;  // with keys, and as many without

// One load of the agent, claim and release included: seconds as the caller sees it.
Result<double> LoadOnce(EngineSide& reader, const proto::Ticket& ticket, agent::PullStats& stats) {
  std::mutex mutex;
  std::condition_variable done;
  std::optional<Result<agent::LoadResult>> result;
  const TimePoint start = steady_clock::now();
  reader.agent().Post([&] {
    reader.Load(ticket, [&](Result<agent::LoadResult> r) {
      const std::lock_guard lock(mutex);
      result = std::move(r);
      done.notify_one();
    });
  });
  std::unique_lock lock(mutex);
  done.wait(lock, [&] { return result.has_value(); });  // a load has its own deadline
  const double seconds = std::chrono::duration<double>(steady_clock::now() - start).count();
  if (!result->has_value()) return Error(result->error());
  stats = (*result)->own;
  return seconds;
}

Result<proto::Ticket> ReceiveTicket(Channel& owner) {
  std::string text;
  KVRELAY_RETURN_IF_ERROR(owner.ReceiveText(text));
  return proto::DecodeTicket(text);
}

// Loads that have claimed their leases, and wait to be told to pull.
class ClaimedLoads {
 public:
  static Result<std::unique_ptr<ClaimedLoads>> Claim(EngineSide& reader, Channel& owner,
                                                     uint32_t count) {
    auto loads = std::unique_ptr<ClaimedLoads>(new ClaimedLoads(reader));
    for (uint32_t i = 0; i < count; ++i) {
      KVRELAY_ASSIGN_OR_RETURN(const proto::Ticket ticket, ReceiveTicket(owner));
      reader.agent().Post([loads = loads.get(), ticket] {
        loads->loads_.push_back(loads->reader_.Claim(
            ticket,
            {.finished = [loads](const Result<agent::LoadResult>& r) { loads->OnFinished(r); },
             .drained = [loads] { loads->OnDrained(); }}));
      });
    }
    const TimePoint until = steady_clock::now() + std::chrono::seconds(30);
    while (loads->Claimed() < count) {
      if (steady_clock::now() > until) {
        return Error(Code::kDeadlineExceeded, "not all leases are claimed after 30 s");
      }
      std::this_thread::sleep_for(Millis(1));
    }
    return loads;
  }

  // Seconds from the order to pull to the completion, both on the agent's control thread.
  Result<double> PullNext() {
    reader_.agent().Post([this] {
      const std::shared_ptr<agent::Load> load = loads_[next_++].lock();
      start_ = steady_clock::now();
      if (load) load->SetReady();  // else it has failed already
    });
    std::unique_lock lock(mutex_);
    done_.wait(lock, [this] { return ended_.has_value(); });  // a load has its own deadline
    const Result<double> seconds = *std::exchange(ended_, std::nullopt);
    return seconds;
  }

 private:
  explicit ClaimedLoads(EngineSide& reader) : reader_(reader) {}

  uint64_t Claimed() {
    std::promise<uint64_t> held;
    reader_.agent().Post([this, &held] {
      reader_.agent().Describe(
          [&held](const agent::EngineSnapshot& snapshot) { held.set_value(snapshot.claims_held); });
    });
    return held.get_future().get();
  }
  void OnFinished(const Result<agent::LoadResult>& result) {
    const double seconds = std::chrono::duration<double>(steady_clock::now() - start_).count();
    const std::lock_guard lock(mutex_);
    finished_ = result.has_value() ? Result<double>(seconds) : Error(result.error());
  }
  void OnDrained() {
    const std::lock_guard lock(mutex_);
    ended_ = std::exchange(finished_, std::nullopt);
    done_.notify_one();
  }

  EngineSide& reader_;
  // The control thread.
  std::vector<std::weak_ptr<agent::Load>> loads_;
  size_t next_ = 0;
  TimePoint start_;

  std::mutex mutex_;
  std::condition_variable done_;
  // Under the mutex.
  std::optional<Result<double>> finished_;
  std::optional<Result<double>> ended_;  // drained, too
};

Result<Json> MeasureClaimed(const AgentPulls& pulls, EngineSide& reader, Channel& owner) {
  constexpr uint32_t kAtOnce = 16;
  const auto pull = [&](uint32_t left, Duration silence, std::vector<double>& us) -> Status {
    while (left > 0) {
      const uint32_t some = std::min(kAtOnce, left);
      KVRELAY_ASSIGN_OR_RETURN(const auto loads, ClaimedLoads::Claim(reader, owner, some));
      for (uint32_t i = 0; i < some; ++i) {
        std::this_thread::sleep_for(silence);
        KVRELAY_ASSIGN_OR_RETURN(const double seconds, loads->PullNext());
        us.push_back(seconds * 1e6);
      }
      left -= some;
    }
    return {};
  };
  std::vector<double> hot;
  std::vector<double> cold;
  KVRELAY_RETURN_IF_ERROR(pull(pulls.loads, {}, hot));
  KVRELAY_RETURN_IF_ERROR(pull(pulls.silences, pulls.silence, cold));
  Json json = {{"hot", TimesOf(hot)}};
  if (!cold.empty()) json["cold"] = TimesOf(cold);
  return json;
}

Result<Json> MeasureLoads(const AgentPulls& pulls, EngineSide& reader, Channel& owner) {
  std::vector<double> load_us;
  std::vector<double> pull_us;
  for (uint32_t i = 0; i <= pulls.loads; ++i) {
    KVRELAY_ASSIGN_OR_RETURN(const proto::Ticket ticket, ReceiveTicket(owner));
    agent::PullStats stats;
    KVRELAY_ASSIGN_OR_RETURN(const double seconds, LoadOnce(reader, ticket, stats));
    if (i == 0) continue;  // it connected
    load_us.push_back(seconds * 1e6);
    pull_us.push_back(stats.pull_ms * 1e3);
  }
  KVRELAY_ASSIGN_OR_RETURN(Json claimed, MeasureClaimed(pulls, reader, owner));
  return Json{{"load", TimesOf(load_us)},  // from the ticket: claim, pull, release
              {"pull", TimesOf(pull_us)},  // of it, on the rank
              // Of a claimed lease, from the call that says so to the completion.
              {"claimed_pull", std::move(claimed)}};
}

// Milliseconds of one load from each of kFirstOwners that the reader meets for the first time.
Result<Json> MeasureFirstLoads(EngineSide& reader, Channel& owner) {
  std::vector<double> ms;
  for (uint32_t i = 0; i < kFirstOwners; ++i) {
    KVRELAY_ASSIGN_OR_RETURN(const proto::Ticket ticket, ReceiveTicket(owner));
    agent::PullStats stats;
    KVRELAY_ASSIGN_OR_RETURN(const double seconds, LoadOnce(reader, ticket, stats));
    ms.push_back(seconds * 1e3);
  }
  return SpreadOf(ms).ToJson();
}

Status SendTickets(Channel& reader, EngineSide& owner, uint32_t count) {
  KVRELAY_ASSIGN_OR_RETURN(const auto tickets, owner.Offer(count));
  for (const proto::Ticket& ticket : tickets) {
    KVRELAY_RETURN_IF_ERROR(reader.SendText(proto::EncodeTicket(ticket)));
  }
  return {};
}

}  // namespace

Status OfferToAgents(Channel& reader, const std::string& folder, const AgentPulls& pulls,
                     std::shared_ptr<const transport::CurveIdentity> curve) {
  std::vector<std::unique_ptr<EngineSide>> owners;
  const auto offer = [&](uint32_t leases, const auto& identity) -> Status {
    KVRELAY_ASSIGN_OR_RETURN(
        owners.emplace_back(),
        EngineSide::Create(folder + "/owner" + std::to_string(owners.size()), leases, identity));
    return SendTickets(reader, *owners.back(), leases);
  };
  KVRELAY_RETURN_IF_ERROR(offer(pulls.leases(), nullptr));
  char ready = 0;
  KVRELAY_RETURN_IF_ERROR(reader.Receive(ready));
  for (const auto& identity : {std::shared_ptr<const transport::CurveIdentity>(), curve}) {
    for (uint32_t i = 0; i < kFirstOwners; ++i) KVRELAY_RETURN_IF_ERROR(offer(1, identity));
  }
  char end = 0;
  return reader.Receive(end);
}

Result<nlohmann::ordered_json> MeasureAgents(
    Channel& owners, const std::string& folder, const AgentPulls& pulls,
    std::shared_ptr<const transport::CurveIdentity> curve) {
  KVRELAY_ASSIGN_OR_RETURN(const auto reader,
                           EngineSide::Create(folder + "/agents", pulls.leases(), nullptr));
  KVRELAY_ASSIGN_OR_RETURN(Json json, MeasureLoads(pulls, *reader, owners));
  KVRELAY_ASSIGN_OR_RETURN(const auto keyed,
                           EngineSide::Create(folder + "/keyed", 1, std::move(curve)));
  KVRELAY_RETURN_IF_ERROR(owners.Send('!'));
  // From the ticket to the bytes: hello, handshake and mapping besides what a load does.
  KVRELAY_ASSIGN_OR_RETURN(Json plain_ms, MeasureFirstLoads(*reader, owners));
  KVRELAY_ASSIGN_OR_RETURN(Json curve_ms, MeasureFirstLoads(*keyed, owners));
  json["first_load_ms"] = std::move(plain_ms);
  json["first_load_curve_ms"] = std::move(curve_ms);
  return json;
}

}  // namespace kvrelay::tools
