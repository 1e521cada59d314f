#include "tools/kvrelayd/daemon.h"

#include <glog/logging.h>
#include <unistd.h>

#include <algorithm>
#include <nlohmann/json.hpp>
#include <optional>
#include <thread>

#include "base/build_info.h"
#include "proto/codec.h"
#include "proto/envelope.h"
#include "tools/common/flag_text.h"
#include "tools/common/units.h"
#include "tools/common/version.h"

namespace kvrelay::tools {
namespace {

using std::chrono::steady_clock;

// The control thread never blocks: if it has not answered by then, it is lost.
constexpr Duration kControlDeadline = std::chrono::seconds(5);
constexpr Duration kLook = std::chrono::milliseconds(10);
// A first probe of a prefill daemon is answered, or refused, within milliseconds.
constexpr Duration kFirstProbes = std::chrono::milliseconds(2500);
// Errors of ended requests still have to leave.
constexpr Duration kFarewell = std::chrono::seconds(1);

using PrefillInfos = std::vector<agent::PrefillPool::Info>;

bool AnyUnknown(const PrefillInfos& workers) {
  return std::any_of(workers.begin(), workers.end(), [](const auto& worker) {
    return worker.state == agent::PrefillPool::State::kUnknown;
  });
}

std::vector<agent::RankCache> Caches(const engine::ModelRunner& runner) {
  std::vector<agent::RankCache> caches;
  for (const engine::KvRank& rank : runner.ranks()) {
    caches.push_back({.layout = rank.layout,
                      .shard = rank.shard,
                      .regions = {&rank.region},
                      .device = rank.device});
  }
  return caches;
}

}  // namespace

template <typename Fn>
auto Daemon::OnControl(Fn fn) -> std::optional<decltype(fn())> {
  auto promise = std::make_shared<std::promise<decltype(fn())>>();
  auto future = promise->get_future();
  agent_->Post([promise, fn]() mutable { promise->set_value(fn()); });
  if (future.wait_for(kControlDeadline) != std::future_status::ready) {
    LOG(ERROR) << "the control thread does not answer";
    return std::nullopt;
  }
  return future.get();
}

Result<std::unique_ptr<Daemon>> Daemon::Start(const DaemonOptions& options,
                                              std::vector<EffectiveFlag> flags) {
  std::unique_ptr<Daemon> daemon(new Daemon(
      {.role = options.role, .flags = std::move(flags), .started = steady_clock::now()}));
  KVRELAY_RETURN_IF_ERROR(daemon->OpenEngine(options));
  KVRELAY_RETURN_IF_ERROR(daemon->OpenAgent(options));
  if (options.role == "prefill") {
    daemon->worker_ = std::make_unique<engine::PrefillWorker>(
        *daemon->engine_, *daemon->agent_,
        engine::PrefillOptions{.reuse_from_decode = options.reuse_from_decode,
                               .pull_timeout = Millis(options.pull_timeout_ms)});
  } else {
    daemon->worker_ = std::make_unique<engine::DecodeWorker>(*daemon->engine_, *daemon->agent_);
  }
  daemon->HandleQuestions();
  daemon->agent_->Run();
  daemon->LogStart();
  return daemon;
}

Status Daemon::OpenEngine(const DaemonOptions& options) {
  engine::EngineOptions to = options.engine.options;
  if (options.role == "decode" && options.reuse_from_decode) {
    to.conversation_blocks = options.conversation_blocks;
    to.conversation_ttl = Millis(options.conversation_ttl_ms);
  }
  KVRELAY_ASSIGN_OR_RETURN(std::shared_ptr<const engine::Platform> platform,
                           OpenPlatform(options.engine));
  KVRELAY_ASSIGN_OR_RETURN(engine_, engine::Engine::Create(to, std::move(platform)));
  return Status::Ok();
}

Status Daemon::OpenAgent(const DaemonOptions& options) {
  agent::EngineAgentOptions to;
  to.engine = options.id;
  to.model = engine_->fingerprint();
  to.model_name = ModelName(options.engine.options.model_dir);
  to.block_size = engine_->runner().block_size();
  to.listen = options.listen_at.ToString();
  if (!options.advertise.empty()) to.advertise = options.advertise_at.ToString();
  to.rank_ports = static_cast<int>(options.rank_ports);
  to.transport = options.transport;
  to.run_dir = options.run_dir;
  to.host_id = options.host_id;
  to.data_interface = options.data_interface;
  to.caps = {.bytes_per_s = options.max_bytes_per_s, .inflight_bytes = options.max_inflight_bytes};
  to.max_mapped_bytes = options.max_mapped_bytes;
  to.trusted_data_network = options.DataNetworkIsTrusted();
  to.curve = options.identity;
  to.spin = std::chrono::microseconds(options.spin_us);
  to.lease_ttl = Millis(options.lease_ttl_ms);
  for (const Endpoint& prefill : options.prefill_workers) to.prefill.push_back(prefill.ToString());
  to.owner_role = options.role == "prefill" ? "decode" : "prefill";
  to.fetch.load_timeout = Millis(options.pull_timeout_ms);
  to.fetch.stream = options.stream_pulls;
  to.make_room = [engine = engine_.get()] { return engine->conversations().EvictOne(); };
  KVRELAY_ASSIGN_OR_RETURN(
      agent_, agent::EngineAgent::Create(std::move(to), Caches(engine_->runner()), engine_->pool(),
                                         engine_->prefixes()));
  return Status::Ok();
}

Daemon::~Daemon() {
  if (agent_) agent_->Shutdown();
  if (engine_) engine_->Stop({Code::kDraining, "the daemon has shut down"});
}

void Daemon::HandleQuestions() {
  agent_->rpc().Handle(proto::Type::kHealth,
                       [this](std::string_view, const agent::ResponderPtr& responder) {
                         responder->Reply(proto::Encode(Health()), false);
                       });
  agent_->rpc().Handle(proto::Type::kDescribe,
                       [this](std::string_view, const agent::ResponderPtr& responder) {
                         AnswerDescribe(responder);
                       });
}

proto::HealthReply Daemon::Health() {
  proto::HealthReply reply;
  reply.role = facts_.role;
  reply.draining = WithWorker([](auto& worker) { return worker.draining(); });
  if (reply.draining) {
    reply.reason = "draining";
  } else if (facts_.role == "decode") {
    reply.ready = agent_->prefills().AnyUsable();
    if (!reply.ready) reply.reason = agent_->prefills().WhyNone().message();
  } else {
    reply.ready = true;
  }
  return reply;
}

void Daemon::AnswerDescribe(const agent::ResponderPtr& responder) {
  agent_->Describe([this, responder](const agent::EngineSnapshot& snapshot) {
    const proto::HealthReply health = Health();
    const DaemonState state = {.ready = health.ready, .draining = health.draining};
    proto::DescribeReply reply;
    reply.json = DescriptionToJson(DescribeDaemon(facts_, state, *engine_, *agent_, snapshot));
    responder->Reply(proto::Encode(reply), false);
  });
}

void Daemon::LogStart() {
  std::string line = FullVersionText();
  for (size_t at = line.find('\n'); at != std::string::npos; at = line.find('\n')) {
    line.replace(at, 1, "; ");
  }
  const engine::ModelRunner& runner = engine_->runner();
  line += facts_.role + " " + agent_->endpoint() + ", TP " + std::to_string(runner.tp_size()) +
          ", PP " + std::to_string(runner.pp_size()) + ", model " +
          ModelName(engine_->options().model_dir) + " " + engine_->fingerprint().ToHex() +
          ", cache " + std::to_string(engine_->pool()->num_blocks()) + " blocks of " +
          std::to_string(runner.block_size()) + " tokens in " + FormatBytes(runner.kv_bytes());
  agent_->Describe([line](const agent::EngineSnapshot& snapshot) {
    LOG(INFO) << line << ", transports " << Join(snapshot.transports, ", ");
  });
}

std::string Daemon::ReadyLine() {
  PrefillInfos workers;
  const TimePoint until = steady_clock::now() + kFirstProbes;
  do {
    workers = OnControl([this] { return agent_->prefills().List(); }).value_or(PrefillInfos());
    if (!AnyUnknown(workers)) break;
    std::this_thread::sleep_for(kLook);
  } while (steady_clock::now() < until);

  nlohmann::ordered_json json = {{"schema", 1},
                                 {"ready", true},
                                 {"role", facts_.role},
                                 {"endpoint", agent_->endpoint()},
                                 {"engine_id", agent_->engine().ToHex()},
                                 {"tp", engine_->runner().tp_size()},
                                 {"pp", engine_->runner().pp_size()},
                                 {"pid", ::getpid()},
                                 {"version", GetBuildInfo().version},
                                 {"protocol", proto::kVersionMajor},
                                 {"model_fingerprint", engine_->fingerprint().ToHex()},
                                 {"kv_blocks", engine_->pool()->num_blocks()},
                                 {"kv_bytes", engine_->runner().kv_bytes()}};
  if (facts_.role == "decode") {
    json["prefill"] = nlohmann::ordered_json::array();
    for (const auto& worker : workers) {
      json["prefill"].push_back(
          {{"endpoint", worker.endpoint}, {"state", agent::PrefillPool::StateName(worker.state)}});
    }
  }
  return json.dump();
}

size_t Daemon::Serve(const StopSignals& signals, Duration drain) {
  while (!signals.Wait(std::chrono::hours(1))) {
  }
  LOG(INFO) << "draining for at most " << FormatMillis(ToMillis(drain));
  const auto wait_idle = [this](Duration at_most) {
    const TimePoint until = steady_clock::now() + at_most;
    for (;;) {
      const auto idle =
          OnControl([this] { return WithWorker([](auto& worker) { return worker.Idle(); }); });
      if (idle.value_or(true) || steady_clock::now() >= until) return;
      std::this_thread::sleep_for(kLook);
    }
  };
  OnControl([this] {
    WithWorker([](auto& worker) { worker.Drain(); });
    return true;
  });
  wait_idle(drain);
  const size_t cut = OnControl([this] {
                       return WithWorker([](auto& worker) { return worker.EndAll(); });
                     }).value_or(0);
  if (cut > 0) wait_idle(kFarewell);
  return cut;
}

}  // namespace kvrelay::tools
