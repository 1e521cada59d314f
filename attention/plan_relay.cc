#include <algorithm>
#include <unordered_map>

#include "attention/attention.h"

namespace kvrelay::attention {
namespace {

using Group = RelayMetadata::Group;

// How many blocks both have in common from `first` on, where both have some.
size_t CommonBlocks(std::span<const BlockId> a, std::span<const BlockId> b, size_t first) {
  const size_t most = std::min(a.size(), b.size());
  if (a.data() == b.data()) return most - first;
  const auto from = static_cast<ptrdiff_t>(first);
  const auto until = static_cast<ptrdiff_t>(most);
  const auto [end, other] = std::mismatch(a.begin() + from, a.begin() + until, b.begin() + from);
  return static_cast<size_t>(end - a.begin()) - first;
}

// Those of `candidates` whose prefixes go on behind `first_block`, by the block that comes there;
// in order of their first sequence.
std::vector<Group> SplitByBlock(const Batch& batch, std::span<const uint32_t> candidates,
                                uint32_t first_block, uint32_t level) {
  std::vector<Group> groups;
  std::unordered_map<BlockId, size_t> by_block;
  for (const uint32_t i : candidates) {
    const std::span<const BlockId> prefix = batch.sequences[i].prefix;
    if (batch.sequences[i].rows == 0 || prefix.size() <= first_block) continue;
    const auto [entry, fresh] = by_block.emplace(prefix[first_block], groups.size());
    if (fresh) groups.push_back({{}, {}, first_block, level});
    groups[entry->second].sequences.push_back(i);
  }
  return groups;
}

// The blocks from group.first_block on that all of its sequences have.
std::span<const BlockId> CommonPrefix(const Batch& batch, const Group& group) {
  const std::span<const BlockId> first = batch.sequences[group.sequences.front()].prefix;
  size_t count = first.size() - group.first_block;
  for (const uint32_t i : group.sequences) {
    count = std::min(count, CommonBlocks(first, batch.sequences[i].prefix, group.first_block));
  }
  return first.subspan(group.first_block, count);
}

// "1 group of 16", "3 groups of 16, 8 and 2", "1 group of 16 on 2 levels": the roots.
std::string Describe(const std::vector<Group>& groups) {
  std::vector<size_t> roots;
  uint32_t levels = 0;
  for (const Group& group : groups) {
    if (group.level == 0) roots.push_back(group.sequences.size());
    levels = std::max(levels, group.level + 1);
  }
  std::string text =
      std::to_string(roots.size()) + (roots.size() == 1 ? " group of " : " groups of ");
  for (size_t i = 0; i < roots.size(); ++i) {
    if (i > 0) text += i + 1 == roots.size() ? " and " : ", ";
    text += std::to_string(roots[i]);
  }
  if (levels > 1) text += " on " + std::to_string(levels) + " levels";
  return text;
}

}  // namespace

RelayMetadata PlanRelay(const Batch& batch, const RelayConfig& config) {
  RelayMetadata metadata;
  metadata.shares.resize(batch.sequences.size());
  std::vector<uint32_t> all(batch.sequences.size());
  for (uint32_t i = 0; i < all.size(); ++i) all[i] = i;

  const auto add = [&](std::vector<Group> candidates) {
    for (Group& group : candidates) {
      if (group.sequences.size() < config.min_sharers) continue;
      group.prefix = CommonPrefix(batch, group);
      const auto end = static_cast<uint32_t>(group.first_block + group.prefix.size());
      for (const uint32_t i : group.sequences) metadata.shares[i] = {end, group.level + 1};
      metadata.groups.push_back(std::move(group));
    }
  };
  std::vector<Group> roots = SplitByBlock(batch, all, 0, 0);
  const bool any_prefix = !roots.empty();
  if (config.enabled) add(std::move(roots));
  for (size_t parent = 0; parent < metadata.groups.size(); ++parent) {
    const Group& group = metadata.groups[parent];
    if (group.level + 1 == kMaxRelayLevels) continue;
    add(SplitByBlock(batch, group.sequences,
                     static_cast<uint32_t>(group.first_block + group.prefix.size()),
                     group.level + 1));
  }
  for (const uint32_t i : all) {
    if (metadata.shares[i].levels == 0 && batch.sequences[i].rows > 0) metadata.paged.push_back(i);
  }

  metadata.decision.relay = !metadata.groups.empty();
  if (!config.enabled) {
    metadata.decision.why = "disabled";
  } else if (!any_prefix) {
    metadata.decision.why = "no prefix";
  } else if (metadata.groups.empty()) {
    metadata.decision.why = "fewer than " + std::to_string(config.min_sharers) + " sharers";
  } else {
    metadata.decision.why = Describe(metadata.groups);
  }
  return metadata;
}

}  // namespace kvrelay::attention
