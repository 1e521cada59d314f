// The blocks that hold one request's tokens in an engine's cache, with references that keep them.
#pragma once

#include <cstdint>
#include <utility>
#include <vector>

#include "kvcache/block_pool.h"
#include "kvcache/plan_pull.h"

namespace kvrelay {

// Tables by kind of layers; kinds behind them use the first. Move-only; the destructor gives the
// references back.
class HeldTables {
 public:
  HeldTables() = default;
  // blocks[0] begins with token `first_token`, a multiple of the block size.
  HeldTables(BlockTable blocks, uint32_t first_token) { Add(std::move(blocks), first_token); }
  // Of the next kind. `held_from`: as in TableView.
  void Add(BlockTable blocks, uint32_t first_token, uint32_t held_from = 0) {
    held_.push_back({std::move(blocks), first_token, held_from});
  }

  // Another holder of the same blocks.
  HeldTables Share() const {
    HeldTables other;
    for (const Held& held : held_) other.Add(held.blocks.Share(), held.first_token, held.held_from);
    return other;
  }
  std::vector<KvTable> tables() const {
    std::vector<KvTable> tables;
    for (const Held& held : held_) {
      tables.push_back({{held.blocks.blocks().begin(), held.blocks.blocks().end()},
                        held.first_token,
                        held.held_from});
    }
    return tables;
  }
  uint64_t num_blocks() const {
    uint64_t count = 0;
    for (const Held& held : held_) count += held.blocks.size();
    return count;
  }
  void Reset() { held_.clear(); }

 private:
  struct Held {
    BlockTable blocks;
    uint32_t first_token = 0;
    uint32_t held_from = 0;
  };
  std::vector<Held> held_;
};

}  // namespace kvrelay
