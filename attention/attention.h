// Attention of a batch of queries over a paged KV cache, with log-sum-exp, so that parts can be
// merged.
//
// Shapes: Q and O are fp32, row-major [rows][query heads of this rank][head_dim]; rows of one
// sequence are consecutive tokens. LSE is fp32 [rows][query heads], natural log of the sum of
// exp(logits); -inf where a row sees no key. Query head h uses KV head h / (query_heads /
// kv_heads). Logits are scaled by `scale` (normally 1/sqrt(head_dim)). All arithmetic is fp32. The
// cache may have any dtype: stored numbers are widened as they are, and scales that they have
// (KvLayout::scales) act on dot products and results.
//
// MLA (a layout without V) is the same with absorbed queries: a token's one row holds its latent
// and its rotated key; Q's rows are [W_UK^T q_nope, q_rope], the scale is that of the unabsorbed
// head, and of O's rows the latent's part, multiplied by W_UV, is the head's output.
#pragma once

#include <cstdint>
#include <span>
#include <string>
#include <vector>

#include "base/status.h"
#include "kvcache/kv_view.h"

namespace kvrelay::attention {

// One sequence's part of a step: `rows` new tokens at positions [context - rows, context), whose K
// and V are in the cache already. Row i sees the keys of positions <= context - rows + i.
struct Sequence {
  uint32_t first_row = 0;  // index of its first row in Q
  uint32_t rows = 0;
  uint32_t context = 0;             // tokens in the cache, the new ones included
  std::span<const BlockId> prefix;  // blocks of its shared prefix (whole blocks), may be empty
  // Its own blocks, which start at token prefix.size() * block_size.
  std::span<const BlockId> blocks;
};

// What a layer does beyond scaled, causal softmax; layers of one model may differ. In this order: a
// dot product is scaled, capped, gets its bias, and counts if the row sees the key.
struct AttentionKind {
  // A row sees this many tokens, itself and the last ones before it; 0: all before it.
  uint32_t window = 0;
  float soft_cap = 0;  // logits become soft_cap * tanh(logit / soft_cap); 0: they stay
  // Attention with linear biases: one slope per query head of this rank, times (the key's position
  // - the row's); empty: none.
  std::span<const float> alibi_slopes{};

  bool changes_logits() const { return soft_cap != 0 || !alibi_slopes.empty(); }
};

struct Batch {
  std::span<const Sequence> sequences;
  uint32_t query_heads = 0;  // of this rank
  float scale = 1.0F;
  AttentionKind kind{};
};

// RelayConfig of the field, as far as the operator needs it.
struct RelayConfig {
  bool enabled = true;
  // Fewer sharers than this: plain paged attention. Measured; see bench.
  uint32_t min_sharers = 2;
};

// What the step decided, for metrics and the `relay` field of a request.
struct RelayDecision {
  bool relay = false;
  // "2 groups of 16 and 8", "1 group of 16 on 3 levels", "no prefix", "fewer than 2 sharers",
  // "disabled"
  std::string why;
};

// Sequences grouped by the prefixes that they share: a forest, because those who share a prefix may
// in smaller groups share a longer one. Made once a step, used by all layers.
struct RelayMetadata {
  // Blocks that several sequences have at the same place of their prefixes.
  struct Group {
    std::span<const BlockId> prefix;
    std::vector<uint32_t> sequences;  // indices into Batch::sequences; size >= min_sharers
    uint32_t first_block = 0;         // in the sharers' prefixes; where the parent ends, if any
    uint32_t level = 0;               // 0: a root
  };
  // What groups read for a sequence: the first `blocks` of its prefix, in `levels` groups.
  struct Share {
    uint32_t blocks = 0;
    uint32_t levels = 0;
  };
  std::vector<Group> groups;    // parents before children
  std::vector<Share> shares;    // by sequence
  std::vector<uint32_t> paged;  // sequences that run plain paged attention over prefix + own blocks
  RelayDecision decision;
};
// Groups stand on at most this many levels: each costs a result of the whole batch's size and a
// merge. What lies deeper is read by each sequence for itself.
inline constexpr uint32_t kMaxRelayLevels = 6;
RelayMetadata PlanRelay(const Batch& batch, const RelayConfig& config);

// O(n^2) oracle in fp64, one row at a time. `out` and `lse` sized by the batch.
void NaiveAttention(const KvView& kv, uint32_t layer, const Batch& batch, std::span<const float> q,
                    std::span<float> out, std::span<float> lse);

// Paged attention over prefix + own blocks; blocked and threaded (ParallelFor).
void PagedAttention(const KvView& kv, uint32_t layer, const Batch& batch, std::span<const float> q,
                    std::span<float> out, std::span<float> lse);

// Relay attention: per group one pass of all its rows over the shared blocks, a paged pass of each
// sequence over the rest of its blocks, merged level by level: alpha = 1 / (1 + exp(lse_usr -
// lse_sys)), out = alpha * sys + (1 - alpha) * usr. A window that ends inside the prefix hides the
// prefix's first tokens from a row, one that ends behind it hides all of it. Sequences in
// `metadata.paged` run plain paged attention. Equal to PagedAttention within fp32 rounding.
void RelayAttention(const KvView& kv, uint32_t layer, const Batch& batch,
                    const RelayMetadata& metadata, std::span<const float> q, std::span<float> out,
                    std::span<float> lse);

// Merges two partial results of `rows` x `heads` rows in place into `out`/`lse`. Both sides empty:
// zeros and -inf; never NaN.
void MergePartials(std::span<float> out, std::span<float> lse, std::span<const float> other_out,
                   std::span<const float> other_lse, uint32_t head_dim);

}  // namespace kvrelay::attention
