#include "agent/rank_agent.h"

#include <utility>

#include "base/random.h"

namespace kvrelay::agent {

RankAgent::RankAgent(const RankAgentOptions& options, Counters& counters)
    : loop_(EventLoop::Options{.spin = options.spin}), counters_(counters) {}

Result<std::unique_ptr<RankAgent>> RankAgent::Create(const RankAgentOptions& options,
                                                     const RankCache& cache, Counters& counters) {
  std::unique_ptr<RankAgent> agent(new RankAgent(options, counters));
  KVRELAY_RETURN_IF_ERROR(agent->Open(options, cache));
  return agent;
}

Status RankAgent::Open(const RankAgentOptions& options, const RankCache& cache) {
  std::vector<uint64_t> region_bytes;
  const std::string device = cache.device == nullptr ? "cpu" : cache.device->name();
  for (const Region* region : cache.regions) {
    region_bytes.push_back(region->bytes());
    if (region->place().device == device) continue;
    return {Code::kInvalidArgument, "region " + region->name() + " is on " +
                                        region->place().device + ", its rank's cache on " + device};
  }
  KVRELAY_RETURN_IF_ERROR(cache.layout.Validate(region_bytes));
  KVRELAY_RETURN_IF_ERROR(cache.shard.Validate());
  if (cache.layout.layers() != cache.shard.layer_count ||
      cache.layout.kv_heads != cache.shard.head_count) {
    return {Code::kInvalidArgument, "the cache's layout (" + cache.layout.ToString() +
                                        ") is not its shard's (" + cache.shard.ToString() + ")"};
  }
  auto records =
      Region::AllocateHost(uint64_t{options.record_slots} * sizeof(LeaseRecord), "kvrelay-records");
  if (!records.has_value()) return records.error();
  records_ = std::make_unique<Region>(std::move(*records));
  KVRELAY_RETURN_IF_ERROR(OpenTransports(options, cache));

  auto rpc = ZmqRpc::Create(loop_, counters_,
                            {.listen = options.listen, .curve = options.curve, .socket = {}});
  if (!rpc.has_value()) return rpc.error();
  rpc_ = std::move(*rpc);
  endpoint_ = rpc_->endpoint();

  RankIdentity identity{.engine = options.engine,
                        .incarnation = options.incarnation,
                        .rank = options.rank,
                        .model = options.model,
                        .model_name = options.model_name,
                        .layout = cache.layout,
                        .shard = cache.shard,
                        .regions = {}};
  std::vector<const Region*> regions = cache.regions;
  regions.push_back(records_.get());
  for (const Region* region : regions) {
    identity.regions.push_back({region->bytes(), region->place().device, region->place().exported});
  }
  const RecordMemory memory{.records = reinterpret_cast<LeaseRecord*>(records_->data()),
                            .slots = options.record_slots,
                            .region = static_cast<RegionId>(cache.regions.size())};
  std::vector<transport::Transport*> transports;
  for (const auto& transport : transports_) transports.push_back(transport.get());

  env_ = std::make_unique<Env>(
      Env{loop_, *rpc_, counters_, [] { return Random64(); }, options.owner_role});
  link_ = std::make_unique<LeaderLink>(*env_, options.incarnation);
  owner_ =
      std::make_unique<OwnerRank>(*env_, *link_, identity, memory, transports, RandomFirstEpoch());
  peers_ = std::make_unique<PeerTable>(*env_, identity, transports);
  reader_ = std::make_unique<ReaderRank>(*env_, *link_, *peers_, identity, options.chunk_bytes,
                                         options.max_asked_bytes);
  return Status::Ok();
}

Status RankAgent::OpenTransports(const RankAgentOptions& options, const RankCache& cache) {
  transport::Options common{
      .regions = {},
      .device = cache.device,
      .executor = [this](std::function<void()> fn) { loop_.Post(std::move(fn)); },
      .run_dir = options.run_dir,
      .host_id = options.host_id,
      .data_interface = options.data_interface,
      .curve = options.curve,
      .spin = options.spin,
      .chunk_bytes = options.chunk_bytes,
      .max_mapped_bytes = options.max_mapped_bytes,
      .throttle = options.throttle,
      .incarnation = options.incarnation};
  for (const Region* region : cache.regions) {
    common.regions.push_back(transport::LocalRegion::Of(*region));
  }
  common.regions.push_back(transport::LocalRegion::Of(*records_));

  for (const transport::TransportKind& kind : transport::TransportKinds()) {
    const std::string name(kind.name);
    const bool wanted = options.transport == "auto" ? !kind.encrypts || options.curve != nullptr
                                                    : options.transport == name;
    if (!wanted) continue;
    if (cache.device != nullptr && !kind.devices) {
      transport_notes_.push_back("no " + name + ": the KV cache is on " + cache.device->name());
      continue;
    }
    if (kind.open_ports && !options.trusted_data_network) {
      transport_notes_.push_back("no " + name + ": the data network " + options.data_interface +
                                 " is not trusted");
      continue;
    }
    auto made = kind.create(common);
    if (made.has_value()) {
      transport_notes_.push_back(name);
      transports_.push_back(std::move(*made));
    } else {
      transport_notes_.push_back("no " + name + ": " + made.error().message());
    }
  }
  if (!transports_.empty()) return Status::Ok();
  return {Code::kInvalidArgument,
          "--transport=" + options.transport + ": " +
              (transport_notes_.empty() ? "no such transport" : transport_notes_.back())};
}

RankAgent::~RankAgent() {
  Stop();
  // Operations in flight hold their sessions until the transports end, and sessions hold calls.
  reader_.reset();
  peers_.reset();
  owner_.reset();
  transports_.clear();
  Clear();
}

void RankAgent::Clear() {
  loop_.Clear();
  if (rpc_ != nullptr) rpc_->AbandonAll();
  loop_.Clear();
}

void RankAgent::Run() {
  thread_ = std::thread([this] { loop_.Run(); });
}

void RankAgent::Stop() {
  if (!thread_.joinable()) return;
  loop_.Stop();
  thread_.join();
}

RankSnapshot RankAgent::Snapshot() const {
  const RankIdentity& identity = owner_->identity();
  std::vector<std::pair<std::string_view, transport::Counters>> counters;
  for (const auto& transport : transports_) {
    counters.emplace_back(transport->name(), transport->counters());
  }
  return {.layout = identity.layout,
          .shard = identity.shard,
          .regions = identity.regions,
          .leases = owner_->List(),
          .sessions = reader_->List(),
          .peers = peers_->List(),
          .packed_streams = owner_->packed_streams(),
          .transports = std::move(counters)};
}

}  // namespace kvrelay::agent
