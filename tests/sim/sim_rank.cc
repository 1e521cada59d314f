#include "tests/sim/sim_rank.h"

namespace kvrelay::sim {

SimRank::SimRank(Host& host, const SimRankOptions& options)
    : host_(host),
      process_(host.world),
      rpc_(host.network, process_, options.engine_prefix + std::to_string(options.rank),
           options.engine_prefix),
      memory_(std::make_shared<RankMemory>(options.tp, options.rank, options.format)) {
  host_.graveyard.push_back(memory_);
  const auto add = [&](const char* name, transport::Style style) {
    transports_.push_back(std::make_unique<transport::FakeTransport>(
        host_.fabric, process_, name, style, std::to_string(host_.next_address++),
        memory_->regions(), options.incarnation, host_.throttle));
  };
  if (options.mapped) add("mapped", transport::Style::kOneSided);
  add("packed", transport::Style::kPacked);
  std::vector<transport::Transport*> transports;
  for (const auto& transport : transports_) transports.push_back(transport.get());

  agent::RankIdentity identity{.engine = options.engine,
                               .incarnation = options.incarnation,
                               .rank = options.rank,
                               .model = kModel,
                               .model_name = "tiny",
                               .layout = memory_->layout(),
                               .shard = memory_->shard(),
                               .regions = {}};
  for (const transport::LocalRegion& region : memory_->regions()) {
    identity.regions.push_back({region.bytes, "cpu", "memfd"});
  }
  env_ = std::make_unique<agent::Env>(
      agent::Env{process_, rpc_, counters_, [&world = host.world] { return world.random.Next(); }});
  link_ = std::make_unique<agent::LeaderLink>(*env_, options.incarnation);
  owner_ = std::make_unique<agent::OwnerRank>(
      *env_, *link_, identity, agent::RecordMemory{memory_->records(), kRecordSlots, 1}, transports,
      host.world.random.Next() >> 4);
  peers_ = std::make_unique<agent::PeerTable>(*env_, identity, transports);
  // Chunks of a few rows, so that a pull is several of them.
  reader_ = std::make_unique<agent::ReaderRank>(*env_, *link_, *peers_, identity, 64,
                                                options.max_asked_bytes);
  watch_ = std::make_unique<RankWatch>(host_, rpc_, *memory_, *link_, *owner_, *reader_);
}

void SimRank::Freeze() {
  for (const auto& transport : transports_) host_.fabric.Kill(transport->LocalAddress());
  process_.Kill();
  rpc_.Close();
}

SimRank::~SimRank() { Freeze(); }

size_t SimRank::operations() const {
  size_t n = 0;
  for (const auto& transport : transports_) n += transport->operations();
  return n;
}

}  // namespace kvrelay::sim
