#include "agent/follow.h"

#include <algorithm>
#include <memory>
#include <numeric>
#include <optional>
#include <utility>

#include "kvcache/pull_frontier.h"

namespace kvrelay::agent {
namespace {

// The layers that both hold, counted in the owner's shard.
PullPiece Everything(const KvShard& owner, const KvShard& reader, TokenRange tokens) {
  const uint32_t begin = std::max(owner.layer_begin, reader.layer_begin);
  const uint32_t end = std::min(owner.layer_end(), reader.layer_end());
  return {begin - owner.layer_begin, end - owner.layer_begin, tokens};
}

// Tokens that can not be cut apart.
uint32_t UnitOf(const KvLayout& layout) {
  uint32_t unit = 1;
  if (!layout.opaque()) return unit;
  for (uint32_t kind = 0; kind < layout.num_kinds(); ++kind) {
    unit = std::lcm(unit, layout.kind(kind).block_size);
  }
  return unit;
}

struct Following {
  OwnedSide owner;
  OwnedSide reader;
  PullSource source;
  GuardExpectation want;
  PullFrontier frontier;

  Result<transport::Portion> Next(const GuardWords& words) {
    if (!IsLease(want, words)) return Error(Code::kStaleRead, "the lease has ended");
    transport::Portion portion;
    if (const auto piece = frontier.Next(Progress::Unpack(words.w1))) {
      const uint32_t first = owner.shard().layer_begin;
      KVRELAY_ASSIGN_OR_RETURN(
          portion.plan,
          PlanPull(owner.view(), reader.view(), source.head_begin, source.head_end, piece->tokens,
                   source.head_group, {first + piece->layer_begin, first + piece->layer_end}));
    }
    portion.last = frontier.complete();
    return portion;
  }
};

}  // namespace

transport::NextPortion Follow(OwnedSide owner, OwnedSide reader, const PullSource& source,
                              TokenRange tokens, const GuardExpectation& want) {
  PullFrontier frontier(Everything(owner.shard(), reader.shard(), tokens), UnitOf(owner.layout()));
  auto following = std::make_shared<Following>(
      Following{std::move(owner), std::move(reader), source, want, std::move(frontier)});
  return [following](const GuardWords& words) { return following->Next(words); };
}

}  // namespace kvrelay::agent
