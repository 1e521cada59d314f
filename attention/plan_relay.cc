#include <algorithm>
#include <unordered_map>

#include "attention/attention.h"

namespace kvrelay::attention {
namespace {

bool SamePrefix(std::span<const BlockId> a, std::span<const BlockId> b) {
  return a.size() == b.size() && (a.data() == b.data() || std::ranges::equal(a, b));
}

// "1 group of 16", "3 groups of 16, 8 and 2"
std::string Describe(const std::vector<RelayMetadata::Group>& groups) {
  std::string text =
      std::to_string(groups.size()) + (groups.size() == 1 ? " group of " : " groups of ");
  for (size_t i = 0; i < groups.size(); ++i) {
    if (i > 0) text += i + 1 == groups.size() ? " and " : ", ";
    text += std::to_string(groups[i].sequences.size());
  }
  return text;
}

}  // namespace

RelayMetadata PlanRelay(const Batch& batch, const RelayConfig& config) {
  RelayMetadata metadata;
  std::vector<RelayMetadata::Group> candidates;  // in order of their first sequence
  std::unordered_multimap<BlockId, size_t> by_first_block;
  for (uint32_t i = 0; i < batch.sequences.size(); ++i) {
    const Sequence& sequence = batch.sequences[i];
    if (sequence.rows == 0 || sequence.prefix.empty() || !config.enabled) continue;
    const auto [begin, end] = by_first_block.equal_range(sequence.prefix.front());
    const auto found = std::find_if(begin, end, [&](const auto& entry) {
      return SamePrefix(candidates[entry.second].prefix, sequence.prefix);
    });
    if (found != end) {
      candidates[found->second].sequences.push_back(i);
    } else {
      by_first_block.emplace(sequence.prefix.front(), candidates.size());
      candidates.push_back({sequence.prefix, {i}});
    }
  }

  std::vector<bool> grouped(batch.sequences.size(), false);
  for (RelayMetadata::Group& candidate : candidates) {
    if (candidate.sequences.size() < config.min_sharers) continue;
    for (const uint32_t i : candidate.sequences) grouped[i] = true;
    metadata.groups.push_back(std::move(candidate));
  }
  for (uint32_t i = 0; i < batch.sequences.size(); ++i) {
    if (!grouped[i] && batch.sequences[i].rows > 0) metadata.paged.push_back(i);
  }

  metadata.decision.relay = !metadata.groups.empty();
  if (!config.enabled) {
    metadata.decision.why = "disabled";
  } else if (candidates.empty()) {
    metadata.decision.why = "no prefix";
  } else if (metadata.groups.empty()) {
    metadata.decision.why = "fewer than " + std::to_string(config.min_sharers) + " sharers";
  } else {
    metadata.decision.why = Describe(metadata.groups);
  }
  return metadata;
}

}  // namespace kvrelay::attention
