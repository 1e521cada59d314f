// One side of a pull by value, for plans that are made later and on another thread.
#pragma once

#include <utility>
#include <vector>

#include "kvcache/plan_pull.h"

namespace kvrelay {

// Immutable. Move-only: its views point into its tables.
class OwnedSide {
 public:
  // `tables` by kind of layers; kinds behind them use the first. `scales`: the request's, where the
  // layout says that they come with it.
  OwnedSide(KvLayout layout, KvShard shard, std::vector<KvTable> tables, KvScales scales = {})
      : layout_(std::move(layout)),
        shard_(std::move(shard)),
        tables_(std::move(tables)),
        scales_(std::move(scales)) {
    for (const KvTable& table : tables_) views_.push_back(table.view());
  }
  OwnedSide(OwnedSide&&) = default;
  OwnedSide& operator=(OwnedSide&&) = default;
  OwnedSide(const OwnedSide&) = delete;
  OwnedSide& operator=(const OwnedSide&) = delete;
  ~OwnedSide() = default;

  const KvLayout& layout() const { return layout_; }
  const KvShard& shard() const { return shard_; }
  // Refers to this object.
  PullSide view() const {
    return {layout_, shard_, views_.empty() ? TableView{} : views_.front(), views_,
            scales_.empty() ? nullptr : &scales_};
  }

 private:
  KvLayout layout_;
  KvShard shard_;
  std::vector<KvTable> tables_;
  std::vector<TableView> views_;  // of tables_
  KvScales scales_;
};

}  // namespace kvrelay
