#include "transport/plan_cursor.h"

#include <algorithm>
#include <utility>

#include "kvcache/copy_host.h"

namespace kvrelay::transport {
namespace {

uint32_t HowMany(uint64_t max_bytes, uint64_t unit_bytes) {
  return static_cast<uint32_t>(std::max<uint64_t>(1, max_bytes / unit_bytes));
}

void Skip(CopyBox& box, const CopyDim& dim, uint32_t count) {
  box.src_offset += count * dim.src_stride;
  box.dst_offset += count * dim.dst_stride;
}

// Takes a front part off `box`, which has more than `max_bytes`, along its outermost dimension of
// more than one. The part is of at most `max_bytes`, or one unit of that dimension.
CopyBox SplitFront(CopyBox& box, uint64_t max_bytes) {
  CopyBox front = box;
  if (box.num_pairs > 1) {
    front.num_pairs = HowMany(max_bytes, box.bytes() / box.num_pairs);
    box.first_pair += front.num_pairs;
    box.num_pairs -= front.num_pairs;
  } else if (box.outer.count > 1) {
    front.outer.count = HowMany(max_bytes, box.run_bytes * box.inner.count);
    box.outer.count -= front.outer.count;
    Skip(box, box.outer, front.outer.count);
  } else if (box.inner.count > 1) {
    front.inner.count = HowMany(max_bytes, box.run_bytes);
    box.inner.count -= front.inner.count;
    Skip(box, box.inner, front.inner.count);
  } else {
    front.run_bytes = max_bytes;
    box.run_bytes -= max_bytes;
    box.src_offset += static_cast<int64_t>(max_bytes);
    box.dst_offset += static_cast<int64_t>(max_bytes);
  }
  return front;
}

}  // namespace

PlanCursor::PlanCursor(CopyPlan plan) : left_(std::move(plan.boxes)) {
  std::erase_if(left_, [](const CopyBox& box) { return box.bytes() == 0; });
  std::reverse(left_.begin(), left_.end());
  step_.src_block_stride = plan.src_block_stride;
  step_.dst_block_stride = plan.dst_block_stride;
  step_.pairs = std::move(plan.pairs);
}

uint64_t PlanCursor::Step(uint64_t max_bytes, std::span<const std::byte* const> src_regions,
                          std::span<std::byte* const> dst_regions) {
  step_.boxes.clear();
  uint64_t bytes = 0;
  while (!done()) {
    const uint64_t next = left_.back().bytes();
    if (bytes + next <= max_bytes) {
      step_.boxes.push_back(left_.back());
      left_.pop_back();
      bytes += next;
    } else if (bytes == 0) {
      left_.push_back(SplitFront(left_.back(), max_bytes));
    } else {
      break;  // a step of its own, rather than slivers to fill this one
    }
  }
  if (bytes > 0) ExecuteCopy(step_, src_regions, dst_regions);
  return bytes;
}

}  // namespace kvrelay::transport
