// A model as the runner sees it, and the registry of architectures.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "attention/attention.h"
#include "base/status.h"
#include "engine/checkpoint.h"
#include "engine/model_config.h"
#include "engine/pipeline.h"
#include "kvcache/kv_view.h"

namespace kvrelay::engine {

// One step's work, the same for all ranks: the rows (new tokens) of all sequences, one sequence
// after the other.
struct StepRows {
  std::span<const uint32_t> token_ids;  // below the vocabulary's size
  std::span<const uint32_t> positions;
  std::span<const BlockId> blocks;  // that take each row's K and V, at token position % block_size
  std::span<const attention::Sequence> sequences;
  const attention::RelayMetadata* relay = nullptr;  // null: no relay for any
  bool naive = false;                               // the fp64 reference, whatever `relay` says
  std::span<const uint32_t> logit_rows;  // rows that a next token is wanted of, ascending
};

// The residual stream between two pipeline stages: [rows][hidden_size].
struct StageEdges {
  std::span<const float> in;  // from the stage before; the first reads none
  std::span<float> out;       // for the stage behind, the same on all ranks: rank 0 writes it
};

// A token and its logit.
struct ScoredToken {
  float logit = 0;
  uint32_t id = 0;
};

// What the last stage says of logit_rows, in host memory.
struct StepLogits {
  // [tp ranks][logit_rows]: of the columns that the rank has the largest, the first of equals.
  std::span<ScoredToken> likeliest;
  // [logit_rows][vocab_size], shared by the ranks: each writes columns of its own. Empty: nobody
  // asks.
  std::span<float> all;
};

// One rank's part of a model, with its cache.
class ModelShard {
 public:
  // After the step's K and V of this rank's first `layers` layers are in its cache, where others
  // can read them. Empty: nobody asks.
  using LayersWritten = std::function<void(uint32_t layers)>;

  virtual ~ModelShard() = default;
  // Called on all ranks of the stage at once, inside TpGroup::Run, stage after stage. Writes K and
  // V of all rows to the cache, and in the last stage this rank's part of `logits`. When it returns
  // nothing reads or writes the cache any more.
  virtual Status Forward(const StepRows& step, const StageEdges& edges, const StepLogits& logits,
                         const LayersWritten& layers_written) = 0;
};

using ModelShards = std::vector<std::unique_ptr<ModelShard>>;  // by rank
// Loads the weights of all ranks of the stages, whose groups outlive the shards, as `caches` (by
// rank) do.
using ModelBuilder = Result<ModelShards> (*)(const ModelConfig& config,
                                             const Checkpoint& checkpoint,
                                             std::span<const Stage> stages,
                                             std::span<const KvView> caches);

// The builder of config.architecture; kInvalidArgument names it and the ones that there are. A new
// architecture is one file with a builder, and one line in model.cc.
Result<ModelBuilder> FindArchitecture(const ModelConfig& config);

// kInvalidArgument, with both numbers, when heads or the feed-forward's width do not divide among
// `tp_size` ranks. (More ranks than KV heads are fine when they divide evenly: such ranks hold
// replicas.)
Status CheckTensorParallel(const ModelConfig& config, uint32_t tp_size);

}  // namespace kvrelay::engine
