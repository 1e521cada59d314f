// Which part of the model's KV cache one rank holds: layers (pipeline parallel) and KV heads
// (tensor parallel).
#pragma once

#include <cstdint>
#include <span>
#include <string>
#include <vector>

#include "base/status.h"

namespace kvrelay {

// Which of the model's KV heads a rank holds.
struct KvHeads {
  uint32_t total = 0;
  uint32_t begin = 0;
  uint32_t count = 0;
  uint32_t end() const { return begin + count; }
  bool operator==(const KvHeads&) const = default;
  // Split over ranks as evenly as it goes, neighbours together; with more ranks than heads each
  // rank holds one, replicas on neighbouring ranks. Where one number divides the other that is the
  // standard split.
  static KvHeads Split(uint32_t total, uint32_t tp_size, uint32_t tp_rank);
};

// Global layers, [begin, end).
struct LayerRange {
  uint32_t begin = 0;
  uint32_t end = UINT32_MAX;
  bool operator==(const LayerRange&) const = default;
};

struct KvShard {
  uint32_t tp_rank = 0;
  uint32_t tp_size = 1;
  uint32_t total_layers = 0;  // of the model
  uint32_t layer_begin = 0;   // first layer held
  uint32_t layer_count = 0;
  uint32_t total_heads = 0;  // KV heads of the model (MLA: 1)
  uint32_t head_begin = 0;   // first KV head held
  uint32_t head_count = 0;
  // Models whose layers have different numbers of KV heads: head groups 1, 2, ...; group 0 is
  // above.
  std::vector<KvHeads> more_heads;
  bool operator==(const KvShard&) const = default;

  uint32_t layer_end() const { return layer_begin + layer_count; }
  uint32_t head_end() const { return head_begin + head_count; }
  uint32_t num_head_groups() const { return static_cast<uint32_t>(1 + more_heads.size()); }
  KvHeads heads(uint32_t group) const {  // group < num_head_groups()
    return group == 0 ? KvHeads{total_heads, head_begin, head_count} : more_heads[group - 1];
  }
  // One head group, split as KvHeads::Split says. All layers.
  static Result<KvShard> Make(uint32_t total_layers, uint32_t total_heads, uint32_t tp_size,
                              uint32_t tp_rank);
  Status Validate() const;
  std::string ToString() const;  // "rank 1 of 2: layers 0-5 of 6, heads 2-3 of 4"
};

// What one reader rank takes from one owner rank: global KV heads [head_begin, head_end) of one
// head group, in all layers of that group that both hold.
struct PullSource {
  uint32_t owner = 0;  // index into the `owners` given
  uint32_t head_begin = 0;
  uint32_t head_end = 0;
  uint32_t head_group = 0;
  bool operator==(const PullSource&) const = default;
};

// Which owner ranks a reader has to read, and which heads of each, so that each of its heads comes
// exactly once. Readers of replicated heads spread over the replicas by their own tp_rank.
// kIncompatible when heads or layers that the reader needs are held by nobody; the message names
// both sides' values.
Result<std::vector<PullSource>> AssignSources(const KvShard& reader,
                                              std::span<const KvShard> owners);

}  // namespace kvrelay
