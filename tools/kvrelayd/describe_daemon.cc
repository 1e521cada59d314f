#include "tools/kvrelayd/describe_daemon.h"

#include <unistd.h>

#include <algorithm>
#include <array>
#include <cinttypes>
#include <cstdio>
#include <filesystem>

#include "base/build_info.h"
#include "proto/envelope.h"

namespace kvrelay::tools {
namespace {

std::string Hex(uint64_t value) {
  std::array<char, 17> text;
  std::snprintf(text.data(), text.size(), "%016" PRIx64, value);
  return text.data();
}

Description::Layout DescribeLayout(const KvLayout& layout) {
  return {.format = std::string(KvFormatName(layout.format)),
          .dtype = std::string(DTypeName(layout.dtype)),
          .layers = layout.layers(),
          .kv_heads = layout.kv_heads,
          .head_dim = layout.head_dim,
          .block_size = layout.block_size,
          .num_blocks = layout.num_blocks,
          .block_stride_bytes = layout.block_stride,
          .head_stride_bytes = layout.head_stride,
          .token_stride_bytes = layout.token_stride};
}

Description::Shard DescribeShard(uint32_t rank, const KvShard& shard) {
  return {.rank = rank,
          .tp = shard.tp_size,
          .layer_begin = shard.layer_begin,
          .layer_end = shard.layer_begin + shard.layer_count,
          .total_layers = shard.total_layers,
          .head_begin = shard.head_begin,
          .head_end = shard.head_end(),
          .total_heads = shard.total_heads};
}

void AddRank(Description& d, uint32_t rank, const agent::RankSnapshot& snapshot) {
  d.shards.push_back(DescribeShard(rank, snapshot.shard));
  for (uint32_t id = 0; id < snapshot.regions.size(); ++id) {
    const proto::RegionInfo& region = snapshot.regions[id];
    d.regions.push_back({.rank = rank,
                         .id = id,
                         .device = region.device,
                         .bytes = region.bytes,
                         .exported = region.exported});
  }
  for (const auto& session : snapshot.sessions) {
    d.sessions.push_back({.rank = rank,
                          .number = session.number,
                          .state = session.state,
                          .peer = session.peer,
                          .tokens = session.tokens,
                          .blocks = session.blocks});
  }
  for (const auto& peer : snapshot.peers) {
    d.peers.push_back({.own_rank = rank,
                       .engine_id = peer.engine.ToHex(),
                       .incarnation = Hex(peer.incarnation),
                       .rank = peer.rank,
                       .endpoint = peer.endpoint,
                       .state = peer.state,
                       .path = peer.path,
                       .why = peer.why,
                       .rtt_ms = peer.rtt_ms});
  }
}

void AddLeases(Description& d, const agent::EngineSnapshot& snapshot) {
  for (const auto& lease : snapshot.leases) {
    Description::Lease out = {
        .id = lease.lease.ToHex(),
        .epoch = "",
        .state = lease.state,
        .kind = lease.prefix ? "prefix" : "prompt",
        .tokens = lease.tokens,
        .blocks = lease.blocks,
        .readers = lease.readers,
        .time_left_ms = std::chrono::duration_cast<std::chrono::milliseconds>(lease.left).count()};
    for (const auto& on_rank : snapshot.ranks.front().leases) {
      if (on_rank.lease == lease.lease) out.epoch = Hex(on_rank.epoch);
    }
    d.counters["kvrelay_leases{state=\"" + lease.state + "\"}"] += 1;
    d.leases.push_back(std::move(out));
  }
}

void AddPrefixes(Description& d, engine::Engine& engine) {
  uint64_t token_bytes = 0;
  for (const engine::KvRank& rank : engine.runner().ranks())
    token_bytes += rank.layout.token_bytes();
  for (const SystemPrefixStore::Info& prefix : engine.prefixes().List()) {
    d.prefixes.push_back({.hash = prefix.hash.ToHex(),
                          .tokens = prefix.tokens,
                          .bytes = prefix.tokens * token_bytes,
                          .references = prefix.references,
                          .hits = prefix.hits});
  }
}

void AddTransportCounters(Description& d, uint32_t rank, const agent::RankSnapshot& snapshot) {
  for (const auto& [transport, counters] : snapshot.transports) {
    for (const auto& [name, value] : counters) {
      d.counters["kvrelay_transport_" + std::string(name) + "{path=\"" + std::string(transport) +
                 "\",rank=\"" + std::to_string(rank) + "\"}"] = static_cast<double>(value);
    }
  }
}

void AddCounters(Description& d, engine::Engine& engine, agent::EngineAgent& agent) {
  for (const auto& [name, value] : agent.counters().Snapshot()) {
    d.counters[name] = static_cast<double>(value);
  }
  d.counters["kvrelay_kv_blocks{state=\"free\"}"] = static_cast<double>(d.blocks.free);
  d.counters["kvrelay_kv_blocks{state=\"used\"}"] = static_cast<double>(d.blocks.used);
  d.counters["kvrelay_kv_blocks{state=\"quarantine\"}"] = static_cast<double>(d.blocks.quarantine);
  const engine::SchedulerCounts counts = engine.counts();
  const ConversationStore::Info kept = engine.conversations().info();
  d.counters["kvrelay_prompt_tokens_computed_total"] = static_cast<double>(counts.prompt_tokens);
  d.counters["kvrelay_conversations"] = kept.conversations;
  d.counters["kvrelay_conversations_ended_total{reason=\"evicted\"}"] =
      static_cast<double>(kept.evictions);
  d.counters["kvrelay_conversations_ended_total{reason=\"ttl\"}"] =
      static_cast<double>(kept.expired);
  d.counters["kvrelay_queue_depth"] = counts.queued;
  d.counters["kvrelay_prefixes_found_total"] = static_cast<double>(counts.prefixes_found);
  d.counters["kvrelay_prefixes_promoted_total"] = static_cast<double>(counts.prefixes_promoted);
}

void AddVirtualKv(Description& d, const VirtualKvMetrics& metrics) {
  d.counters["kvrelay_kv_baseline_memory_mb"] = metrics.baseline_memory_mb;
  d.counters["kvrelay_kv_optimized_memory_mb"] = metrics.optimized_memory_mb;
  d.counters["kvrelay_kv_memory_saved_mb"] = metrics.memory_saved_mb;
  d.counters["kvrelay_kv_memory_savings_percent"] = metrics.memory_savings_percent;
  d.counters["kvrelay_kv_utilization"] = metrics.utilization;
  d.counters["kvrelay_kv_fragmentation"] = metrics.fragmentation;
  d.counters["kvrelay_kv_pool_mb"] = metrics.pool_mb;
  d.counters["kvrelay_kv_cached_mb"] = metrics.cached_mb;
  d.counters["kvrelay_kv_pages_mapped_total{when=\"ahead\"}"] =
      static_cast<double>(metrics.pages_mapped_ahead);
  d.counters["kvrelay_kv_pages_mapped_total{when=\"needed\"}"] =
      static_cast<double>(metrics.pages_mapped - metrics.pages_mapped_ahead);
  d.counters["kvrelay_kv_pages_reused_total"] = static_cast<double>(metrics.pages_reused);
  d.counters["kvrelay_kv_pages_reclaimed_total"] = static_cast<double>(metrics.pages_reclaimed);
  d.counters["kvrelay_kv_stray_bytes_total"] = static_cast<double>(metrics.stray_bytes);
}

void AddThrottle(Description& d, const transport::Throttle::Counts& counts) {
  d.counters["kvrelay_capped_inflight_bytes"] = static_cast<double>(counts.inflight_bytes);
  d.counters["kvrelay_capped_bytes_total"] = static_cast<double>(counts.moved_bytes);
  d.counters["kvrelay_capped_waits_total"] = static_cast<double>(counts.waits);
  d.counters["kvrelay_capped_wait_seconds_total"] = ToMillis(counts.waited) / 1000;
}

}  // namespace

std::string ModelName(const std::string& model_dir) {
  const std::filesystem::path path =
      std::filesystem::path(model_dir + "/").lexically_normal().parent_path();
  return path.filename().string();
}

Description DescribeDaemon(const DaemonFacts& facts, const DaemonState& state,
                           engine::Engine& engine, agent::EngineAgent& agent,
                           const agent::EngineSnapshot& snapshot) {
  Description d;
  const TimePoint now = std::chrono::steady_clock::now();
  d.engine = {.engine_id = agent.engine().ToHex(),
              .incarnation = Hex(agent.incarnation()),
              .role = facts.role,
              .endpoint = agent.endpoint(),
              .version = std::string(GetBuildInfo().version),
              .protocol = proto::kVersionMajor,
              .model_fingerprint = engine.fingerprint().ToHex(),
              .model_name = ModelName(engine.options().model_dir),
              .tp = engine.runner().tp_size(),
              .pp = engine.runner().pp_size(),
              .pid = ::getpid(),
              .uptime_ms = static_cast<uint64_t>(ToMillis(now - facts.started)),
              .ready = state.ready,
              .draining = state.draining};
  for (const EffectiveFlag& flag : facts.flags) {
    d.flags.push_back({.name = flag.name, .value = flag.value, .source = flag.source});
  }
  d.transports = snapshot.transports;
  d.layout = DescribeLayout(snapshot.ranks.front().layout);
  for (uint32_t rank = 0; rank < snapshot.ranks.size(); ++rank) {
    AddRank(d, rank, snapshot.ranks[rank]);
    AddTransportCounters(d, rank, snapshot.ranks[rank]);
  }
  d.blocks = {.total = engine.pool()->num_blocks(),
              .used = engine.pool()->used_blocks() -
                      std::min<uint64_t>(snapshot.quarantined_blocks, engine.pool()->used_blocks()),
              .free = engine.pool()->free_blocks(),
              .quarantine = snapshot.quarantined_blocks,
              .kept = engine.conversations().info().blocks,
              .shared = engine.prefixes().blocks()};
  AddCounters(d, engine, agent);
  if (const VirtualKvCache* cache = engine.runner().virtual_cache()) {
    AddVirtualKv(d, cache->metrics());
  }
  if (snapshot.throttle) AddThrottle(d, *snapshot.throttle);
  AddLeases(d, snapshot);
  AddPrefixes(d, engine);
  for (const auto& worker : snapshot.prefills) {
    d.prefill_workers.push_back({.endpoint = worker.endpoint,
                                 .state = std::string(agent::PrefillPool::StateName(worker.state)),
                                 .why = worker.why,
                                 .outstanding_tokens = worker.outstanding_tokens,
                                 .failures = static_cast<uint64_t>(worker.failures)});
  }
  return d;
}

}  // namespace kvrelay::tools
