#include "agent/engine_agent.h"

#include <algorithm>
#include <utility>

#include "base/build_info.h"
#include "base/random.h"
#include "proto/codec.h"

namespace kvrelay::agent {
namespace {

constexpr Duration kProbeEvery = Millis(1000);
constexpr Duration kFirstProbePause = Millis(100);
constexpr Duration kLongestProbePause = Millis(5000);  // between probes of an unreachable worker

// "tcp://host:port" -> "tcp://host"; empty when there is no port.
std::string WithoutPort(const std::string& endpoint) {
  const size_t colon = endpoint.rfind(':');
  return colon == std::string::npos || colon < 6 ? "" : endpoint.substr(0, colon);
}

std::string ModelText(const std::string& name, const RankCache& cache) {
  return name + ": " + std::to_string(cache.shard.total_layers) + " layers x " +
         std::to_string(cache.shard.total_heads) + " KV heads x " +
         std::to_string(cache.layout.head_dim);
}

// With the key behind it, where there is one.
std::string PortOf(const std::string& endpoint) { return endpoint.substr(endpoint.rfind(':') + 1); }

// "#KEY", or empty.
std::string KeyOf(const std::string& endpoint) {
  return endpoint.substr(std::min(endpoint.find('#'), endpoint.size()));
}

}  // namespace

EngineAgent::EngineAgent(EngineAgentOptions options, std::shared_ptr<BlockPool> pool)
    : options_(std::move(options)), incarnation_(RandomIncarnation()), pool_(std::move(pool)) {
  if (options_.engine.IsZero()) options_.engine = RandomId<EngineId>();
  if (options_.caps.any()) throttle_ = std::make_shared<transport::Throttle>(options_.caps);
}

Result<std::unique_ptr<EngineAgent>> EngineAgent::Create(EngineAgentOptions options,
                                                         const std::vector<RankCache>& caches,
                                                         std::shared_ptr<BlockPool> pool,
                                                         SystemPrefixStore& prefixes) {
  std::unique_ptr<EngineAgent> agent(new EngineAgent(std::move(options), std::move(pool)));
  KVRELAY_RETURN_IF_ERROR(agent->Open(caches, prefixes));
  return agent;
}

std::string EngineAgent::ListenOf(uint32_t rank) const {
  if (rank == 0) return options_.listen;
  const int port = options_.rank_ports == 0 ? 0 : options_.rank_ports + static_cast<int>(rank) - 1;
  return WithoutPort(options_.listen) + ":" + std::to_string(port);
}

std::string EngineAgent::AdvertisedAs(uint32_t rank, const std::string& bound) const {
  if (options_.advertise.empty()) return bound;
  const std::string port = PortOf(options_.advertise);
  if (rank == 0 && port != "0") return options_.advertise + KeyOf(bound);
  return WithoutPort(options_.advertise) + ":" + PortOf(bound);
}

Status EngineAgent::Open(const std::vector<RankCache>& caches, SystemPrefixStore& prefixes) {
  if (caches.empty() || WithoutPort(options_.listen).empty()) {
    return {Code::kInvalidArgument, "cannot listen on '" + options_.listen + "' with " +
                                        std::to_string(caches.size()) +
                                        " ranks: an endpoint looks like tcp://127.0.0.1:7600"};
  }
  model_text_ = ModelText(options_.model_name, caches.front());
  std::vector<std::string> endpoints;
  std::vector<KvShard> shards;
  std::vector<KvLayout> layouts;
  for (uint32_t rank = 0; rank < caches.size(); ++rank) {
    const RankAgentOptions options{
        .engine = options_.engine,
        .incarnation = incarnation_,
        .rank = rank,
        .model = options_.model,
        .model_name = options_.model_name,
        .listen = ListenOf(rank),
        .transport = options_.transport,
        .run_dir = options_.run_dir,
        .host_id = options_.host_id,
        .data_interface = options_.data_interface,
        .trusted_data_network = options_.trusted_data_network,
        .curve = options_.curve,
        .spin = options_.spin,
        .chunk_bytes = options_.chunk_bytes,
        .max_mapped_bytes = options_.max_mapped_bytes,
        .throttle = throttle_,
        .max_asked_bytes =
            options_.caps.inflight_bytes == 0
                ? 0
                : std::max<uint64_t>(1, options_.caps.inflight_bytes / caches.size()),
        .record_slots = options_.record_slots,
        .owner_role = options_.owner_role};
    auto agent = RankAgent::Create(options, caches[rank], counters_);
    if (!agent.has_value()) return agent.error();
    endpoints.push_back(AdvertisedAs(rank, (*agent)->endpoint()));
    shards.push_back(caches[rank].shard);
    layouts.push_back(caches[rank].layout);
    ranks_.push_back(std::move(*agent));
  }
  endpoint_ = endpoints.front();

  links_ = std::make_unique<RankLinks>(env(), incarnation_, endpoints);
  owner_ = std::make_unique<OwnerLeader>(env(), *links_,
                                         OwnerOptions{.model = options_.model,
                                                      .rank_shards = shards,
                                                      .rank_layouts = layouts,
                                                      .ttl = options_.lease_ttl,
                                                      .cap = options_.lease_cap,
                                                      .max_leases = options_.record_slots});
  claims_ = std::make_unique<Claims>(env(), EngineKey{options_.engine, incarnation_});
  reader_ = std::make_unique<ReaderContext>(
      ReaderContext{.env = env(),
                    .claims = *claims_,
                    .ranks = *links_,
                    .model = options_.model,
                    .only_rank = ranks_.size() == 1 ? &ranks_.front()->reader() : nullptr});
  prefix_table_ = std::make_unique<PrefixTable>(*reader_, prefixes, *pool_, options_.block_size,
                                                options_.make_room);
  prefills_ = std::make_unique<PrefillPool>(env().clock, options_.prefill);
  rpc().Handle(proto::Type::kPing, [this](std::string_view, const ResponderPtr& responder) {
    responder->Reply(proto::Encode(proto::PingReply{.engine = options_.engine,
                                                    .incarnation = incarnation_,
                                                    .version = std::string(GetBuildInfo().version),
                                                    .model = options_.model,
                                                    .model_text = model_text_,
                                                    .draining = draining_}),
                     false);
  });
  for (const std::string& endpoint : options_.prefill) Probe(endpoint, kFirstProbePause);
  return Status::Ok();
}

EngineAgent::~EngineAgent() { Shutdown(); }

void EngineAgent::Run() {
  for (const auto& rank : ranks_) rank->Run();
}

void EngineAgent::Shutdown() {
  for (const auto& rank : ranks_) rank->Stop();
  for (const auto& rank : ranks_) rank->Clear();
}

// Looks at a prefill worker for ever: often while it answers, with growing pauses while it does
// not.
void EngineAgent::Probe(const std::string& endpoint, Duration pause) {
  rpc().Call(
      endpoint, proto::Type::kPing, proto::Encode(proto::Empty{}), env().clock.Now() + Millis(2000),
      [this, endpoint, pause](const Result<std::string>& reply, bool) {
        const auto ping = reply.has_value()
                              ? proto::Decode<proto::PingReply>(*reply)
                              : Result<proto::PingReply>(tl::unexpected(reply.error()));
        Duration next = kProbeEvery;
        Duration next_pause = kFirstProbePause;
        using State = PrefillPool::State;
        if (!ping.has_value()) {
          const bool incompatible = ping.error().code() == Code::kIncompatible;
          prefills_->SetState(endpoint, incompatible ? State::kIncompatible : State::kUnreachable,
                              ping.error().message());
          next = pause;
          next_pause = std::min(pause * 2, kLongestProbePause);
        } else if (ping->model != options_.model) {
          prefills_->SetState(endpoint, State::kIncompatible,
                              "model there " + ping->model.ToHex() + " (" + ping->model_text +
                                  "), here " + options_.model.ToHex() + " (" + model_text_ + ")");
        } else {
          prefills_->SetIncarnation(endpoint, ping->incarnation);
          prefills_->SetState(endpoint, ping->draining ? State::kDraining : State::kReady, "");
        }
        env().clock.CallAfter(next, [this, endpoint, next_pause] { Probe(endpoint, next_pause); });
      });
}

std::shared_ptr<Load> EngineAgent::StartLoad(LoadRequest request, Load::Events events) {
  auto load =
      std::make_shared<Load>(*reader_, *prefix_table_, std::move(request), std::move(events));
  load->Start();
  return load;
}

std::shared_ptr<Fetch> EngineAgent::StartFetch(FetchRequest request,
                                               std::function<void(Result<FetchResult>)> finished) {
  auto fetch = std::make_shared<Fetch>(*reader_, *prefix_table_, *prefills_, options_.fetch,
                                       std::move(request), std::move(finished));
  fetch->Start();
  return fetch;
}

void EngineAgent::Describe(std::function<void(EngineSnapshot)> done) {
  struct Gather {
    EngineSnapshot snapshot;
    size_t left = 0;
    std::function<void(EngineSnapshot)> done;
  };
  auto gather = std::make_shared<Gather>();
  gather->snapshot.ranks.resize(ranks_.size());
  gather->left = ranks_.size();
  gather->done = std::move(done);
  for (size_t rank = 0; rank < ranks_.size(); ++rank) {
    ranks_[rank]->Post([this, gather, rank] {
      RankSnapshot part = ranks_[rank]->Snapshot();
      Post([this, gather, rank, part = std::move(part)]() mutable {
        gather->snapshot.ranks[rank] = std::move(part);
        if (--gather->left > 0) return;
        EngineSnapshot& all = gather->snapshot;
        all.transports = ranks_.front()->transport_notes();
        all.leases = owner_->List();
        all.prefills = prefills_->List();
        all.claims_held = claims_->held();
        all.releases_unacknowledged = claims_->unacknowledged();
        all.prefix_waiters = prefix_table_->waiting();
        all.quarantined_blocks = reader_->quarantined_blocks;
        if (throttle_) all.throttle = throttle_->counts();
        gather->done(std::move(all));
      });
    });
  }
}

}  // namespace kvrelay::agent
