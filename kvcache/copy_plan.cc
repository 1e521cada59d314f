#include "kvcache/copy_plan.h"

#include <algorithm>
#include <string>

namespace kvrelay {
namespace {

// Wide enough that nothing below can overflow: 32-bit counts and block ids times 64-bit strides.
__extension__ using Wide = __int128;

// Smallest and largest block of both sides in a run of pairs.
struct BlockBounds {
  BlockPair least;
  BlockPair most;
};

BlockBounds BoundsOf(std::span<const BlockPair> pairs) {
  BlockBounds bounds{pairs[0], pairs[0]};
  for (const BlockPair& pair : pairs) {
    bounds.least.src = std::min(bounds.least.src, pair.src);
    bounds.least.dst = std::min(bounds.least.dst, pair.dst);
    bounds.most.src = std::max(bounds.most.src, pair.src);
    bounds.most.dst = std::max(bounds.most.dst, pair.dst);
  }
  return bounds;
}

struct Reach {
  Wide begin = 0;
  Wide end = 0;

  void Add(uint32_t count, int64_t stride) {
    const Wide last = Wide{count - 1} * stride;
    (stride < 0 ? begin : end) += last;
  }
};

Status CheckReach(std::string_view side, size_t box, const Reach& reach, RegionId region,
                  std::span<const uint64_t> region_bytes) {
  if (region >= region_bytes.size()) {
    return Error(Code::kInvalidArgument, "copy plan: box " + std::to_string(box) + " names " +
                                             std::string(side) + " region " +
                                             std::to_string(region) + ", there are " +
                                             std::to_string(region_bytes.size()));
  }
  if (reach.begin < 0 || reach.end > Wide{region_bytes[region]}) {
    return Error(Code::kInvalidArgument, "copy plan: box " + std::to_string(box) + " leaves " +
                                             std::string(side) + " region " +
                                             std::to_string(region) + " of " +
                                             std::to_string(region_bytes[region]) + " bytes");
  }
  return Status::Ok();
}

}  // namespace

uint64_t CopyPlan::bytes() const {
  uint64_t sum = 0;
  for (const CopyBox& box : boxes) sum += box.bytes();
  return sum;
}

uint64_t CopyPlan::slices() const {
  uint64_t sum = 0;
  for (const CopyBox& box : boxes) {
    sum += uint64_t{box.inner.count} * box.outer.count * box.num_pairs;
  }
  return sum;
}

Status CopyPlan::Validate(std::span<const uint64_t> src_region_bytes,
                          std::span<const uint64_t> dst_region_bytes) const {
  BlockBounds bounds;
  for (size_t i = 0; i < boxes.size(); ++i) {
    const CopyBox& box = boxes[i];
    if (box.run_bytes == 0 || box.inner.count == 0 || box.outer.count == 0 || box.num_pairs == 0 ||
        box.first_pair > pairs.size() || box.num_pairs > pairs.size() - box.first_pair) {
      return Error(Code::kInvalidArgument,
                   "copy plan: box " + std::to_string(i) + " is empty or names pairs " +
                       std::to_string(box.first_pair) + " + " + std::to_string(box.num_pairs) +
                       " of " + std::to_string(pairs.size()));
    }
    // Boxes of one span of tokens follow each other, so that each pair is looked at about once.
    if (i == 0 || box.first_pair != boxes[i - 1].first_pair ||
        box.num_pairs != boxes[i - 1].num_pairs) {
      bounds = BoundsOf(std::span(pairs).subspan(box.first_pair, box.num_pairs));
    }
    Reach src{box.src_offset + Wide{bounds.least.src} * src_block_stride,
              box.src_offset + Wide{bounds.most.src} * src_block_stride + box.run_bytes};
    Reach dst{box.dst_offset + Wide{bounds.least.dst} * dst_block_stride,
              box.dst_offset + Wide{bounds.most.dst} * dst_block_stride + box.run_bytes};
    for (const CopyDim& dim : {box.inner, box.outer}) {
      src.Add(dim.count, dim.src_stride);
      dst.Add(dim.count, dim.dst_stride);
    }
    KVRELAY_RETURN_IF_ERROR(CheckReach("source", i, src, box.src_region, src_region_bytes));
    KVRELAY_RETURN_IF_ERROR(CheckReach("destination", i, dst, box.dst_region, dst_region_bytes));
  }
  return Status::Ok();
}

}  // namespace kvrelay
