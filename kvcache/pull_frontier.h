// How far a pull that follows a prompt's computation has come, and what it may copy next.
#pragma once

#include <cstdint>
#include <optional>
#include <vector>

#include "kvcache/lease_record.h"
#include "kvcache/plan_pull.h"

namespace kvrelay {

// Some tokens of some layers, counted in the owner's shard: [layer_begin, layer_end).
struct PullPiece {
  uint32_t layer_begin = 0;
  uint32_t layer_end = 0;
  TokenRange tokens;
  bool operator==(const PullPiece&) const = default;
};

// One thread at a time.
class PullFrontier {
 public:
  // What is wanted in all. Pieces end at multiples of `unit` tokens, or where `all` does.
  explicit PullFrontier(const PullPiece& all, uint32_t unit = 1);

  // The largest piece that is computed and was not returned before; nullopt: there is none now.
  // Over all calls each token of each layer comes once. `progress` never goes back.
  std::optional<PullPiece> Next(const Progress& progress);
  // Everything was returned.
  bool complete() const;

 private:
  const PullPiece all_;
  const uint32_t unit_;
  std::vector<uint32_t> done_;  // by layer: tokens before it were returned
};

}  // namespace kvrelay
