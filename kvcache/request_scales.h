// Scales that belong to a request (KvScales::with_request): measured where its KV was computed,
// they travel beside its blocks, in the answer to a claim, and hold for these blocks only.
#pragma once

#include "base/status.h"
#include "kvcache/layout.h"
#include "kvcache/plan_pull.h"
#include "kvcache/shard.h"

namespace kvrelay {

// Whether `scales` can be a request's in this cache: as many as the layout's own would be, normal
// numbers above 0; none where the layout's own hold for all requests. kInvalidArgument.
Status CheckRequestScales(const KvLayout& layout, const KvScales& scales);

// A reader with such scales takes numbers as they are, and with them their scales, from each of its
// sources. One thread.
class TakenScales {
 public:
  // What is referred to outlives it.
  TakenScales(const KvLayout& layout, const KvShard& shard);

  // The scales of what comes of this source; `owner` has the request's where they are the
  // request's. Nothing where the reader's layout has its own. kIncompatible when two sources give
  // one tensor different scales and the reader keeps one of it.
  Status Take(const PullSide& owner, const PullSource& source);

  // So far; none where the reader's layout has its own.
  const KvScales& scales() const { return scales_; }

 private:
  const KvLayout& layout_;
  const KvShard& shard_;
  KvScales scales_;  // 0: not known yet
};

}  // namespace kvrelay
