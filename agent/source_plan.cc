#include "agent/source_plan.h"

#include <algorithm>
#include <string>
#include <vector>

#include "agent/table_hash.h"

namespace kvrelay::agent {
namespace {

HashKey KeyOf(const proto::Meta& meta) {
  HashKey key{};
  std::copy_n(meta.table_hash_key.begin(), key.size(),
              key.begin());  // length checked by the handshake
  return key;
}

std::vector<TableView> ViewsOf(const std::vector<KvTable>& tables) {
  std::vector<TableView> views;
  views.reserve(tables.size());
  for (const KvTable& table : tables) views.push_back(table.view());
  return views;
}

PullSide SideOf(const KvLayout& layout, const KvShard& shard, std::span<const TableView> tables,
                const KvScales& scales) {
  return {layout, shard, tables.empty() ? TableView{} : tables.front(), tables,
          scales.empty() ? nullptr : &scales};
}

}  // namespace

Result<SourcePlan> PlanSource(const proto::Pull& pull, const RankIdentity& identity,
                              const PullSource& source, const ReadyPeer& peer,
                              TakenScales& scales) {
  const proto::Meta& meta = peer.meta;
  const proto::ClaimRank& rank = pull.claim.ranks[source.owner];
  if (rank.slot >= meta.record_slots || rank.shard != meta.shard) {
    return Error(Code::kIncompatible,
                 "the claim's answer contradicts the handshake: slot " + std::to_string(rank.slot) +
                     " of " + std::to_string(meta.record_slots) + ", " + rank.shard.ToString() +
                     " against " + meta.shard.ToString());
  }
  if (const Status bad = CheckRequestScales(meta.layout, rank.scales); !bad.ok()) {
    return Error(Code::kIncompatible, "the claim's answer: " + bad.message());
  }
  const std::vector<TableView> owner = ViewsOf(pull.claim.tables);
  const std::vector<TableView> own = ViewsOf(pull.own_tables);
  const PullSide owner_side = SideOf(meta.layout, meta.shard, owner, rank.scales);
  KVRELAY_RETURN_IF_ERROR(scales.Take(owner_side, source));
  KVRELAY_ASSIGN_OR_RETURN(
      CopyPlan whole,
      PlanPull(owner_side, SideOf(identity.layout, identity.shard, own, scales.scales()),
               source.head_begin, source.head_end, pull.tokens, source.head_group));
  return SourcePlan{
      .guard = {.region = meta.record_region, .offset = rank.slot * sizeof(LeaseRecord)},
      .want = {.epoch = rank.epoch,
               .incarnation = rank.incarnation,
               .table_hash = TableHash(KeyOf(meta), pull.claim.tables, pull.hash,
                                       pull.claim.first_token, pull.claim.tokens),
               .extent = {.tokens = pull.tokens.end,
                          .layers = std::min(rank.shard.layer_end(), identity.shard.layer_end()) -
                                    rank.shard.layer_begin}},
      .whole = std::move(whole)};
}

}  // namespace kvrelay::agent
