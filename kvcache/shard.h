// Which part of the model's KV cache one rank holds: layers (pipeline parallel) and KV heads
// (tensor parallel).
#pragma once

#include <cstdint>
#include <span>
#include <string>
#include <vector>

#include "base/status.h"

namespace kvrelay {

struct KvShard {
  uint32_t tp_rank = 0;
  uint32_t tp_size = 1;
  uint32_t total_layers = 0;  // of the model
  uint32_t layer_begin = 0;   // first layer held
  uint32_t layer_count = 0;
  uint32_t total_heads = 0;  // KV heads of the model (MLA: 1)
  uint32_t head_begin = 0;   // first KV head held
  uint32_t head_count = 0;
  bool operator==(const KvShard&) const = default;

  uint32_t layer_end() const { return layer_begin + layer_count; }
  uint32_t head_end() const { return head_begin + head_count; }
  // The standard split: heads divide evenly over ranks, or, when there are more ranks than heads,
  // ranks divide evenly over heads and hold a replica. All layers. kInvalidArgument names both
  // numbers when neither divides.
  static Result<KvShard> Make(uint32_t total_layers, uint32_t total_heads, uint32_t tp_size,
                              uint32_t tp_rank);
  Status Validate() const;
  std::string ToString() const;  // "rank 1 of 2: layers 0-5 of 6, heads 2-3 of 4"
};

// What one reader rank takes from one owner rank: global KV heads [head_begin, head_end).
struct PullSource {
  uint32_t owner = 0;  // index into the `owners` given
  uint32_t head_begin = 0;
  uint32_t head_end = 0;
  bool operator==(const PullSource&) const = default;
};

// Which owner ranks a reader has to read, and which heads of each, so that each of its heads comes
// exactly once. Readers of replicated heads spread over the replicas by their own tp_rank.
// kIncompatible when heads or layers that the reader needs are held by nobody; the message names
// both sides' values.
Result<std::vector<PullSource>> AssignSources(const KvShard& reader,
                                              std::span<const KvShard> owners);

}  // namespace kvrelay
