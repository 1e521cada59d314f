#include "kvcache/cuda/gather_cuda.h"

#include <algorithm>
#include <cstring>
#include <string>

#include "kvcache/cuda/cuda_status.h"
#include "kvcache/cuda/gather_box.h"
#include "kvcache/cuda/gather_launch.h"

namespace kvrelay::cuda {
namespace {

uint64_t CeilDiv(uint64_t a, uint64_t b) { return (a + b - 1) / b; }

// One launch of these boxes, without its tables.
GatherArgs ArgsOf(std::span<const GatherBox> boxes, bool casts, uint32_t max_sms) {
  GatherArgs args;
  args.casts = casts;
  args.boxes = static_cast<uint32_t>(boxes.size());
  std::copy(boxes.begin(), boxes.end(), args.box);
  std::iter_swap(args.box, std::max_element(args.box, args.box + boxes.size(),
                                            [](const GatherBox& a, const GatherBox& b) {
                                              return a.units < b.units;
                                            }));
  uint64_t units = 0;
  for (const GatherBox& box : boxes) units += box.units;
  // A small request is spread over all CTAs rather than over each thread's loads.
  uint32_t loads = kMaxLoads;
  for (const GatherBox& box : boxes) {
    if (casts) loads = std::min(loads, CastLoads(box.src_unit));
  }
  while (loads > 1 && units < uint64_t{loads} * kGatherThreads * max_sms) loads /= 2;
  args.chunk_units = loads * kGatherThreads;
  uint32_t chunks = 0;
  for (GatherBox& box : std::span(args.box, args.boxes)) {
    box.first_chunk = chunks;
    chunks += static_cast<uint32_t>(CeilDiv(box.units, args.chunk_units));
    box.end_chunk = chunks;
  }
  args.ctas = std::min(chunks, max_sms);
  return args;
}

void AppendLaunches(std::span<const GatherBox> boxes, bool casts, uint32_t max_sms,
                    std::vector<GatherArgs>& launches) {
  for (size_t first = 0; first < boxes.size(); first += kMaxBoxes) {
    const size_t count = std::min<size_t>(kMaxBoxes, boxes.size() - first);
    launches.push_back(ArgsOf(boxes.subspan(first, count), casts, max_sms));
  }
}

}  // namespace

GatherCuda::GatherCuda(GatherCuda&&) noexcept = default;
GatherCuda& GatherCuda::operator=(GatherCuda&&) noexcept = default;
GatherCuda::~GatherCuda() = default;

Result<GatherCuda> GatherCuda::Make(const CopyPlan& plan,
                                    std::span<const std::byte* const> src_regions,
                                    std::span<std::byte* const> dst_regions,
                                    const GatherOptions& options) {
  if (options.max_sms == 0) return Error(Code::kInvalidArgument, "a gather on 0 SMs");
  std::vector<GatherBox> copies;
  std::vector<GatherBox> casts;
  for (const CopyBox& box : plan.boxes) {
    KVRELAY_RETURN_IF_ERROR(
        AppendGatherBoxes(plan, box, src_regions, dst_regions, box.casts ? casts : copies));
  }
  GatherCuda gather;
  AppendLaunches(copies, false, options.max_sms, gather.launches_);
  AppendLaunches(casts, true, options.max_sms, gather.launches_);

  // Segments, places, factors.
  const size_t segment_bytes = plan.segments.size() * sizeof(GatherPair);
  const size_t place_bytes = plan.places.size() * sizeof(GatherPair);
  const size_t factor_bytes = plan.factors.size() * sizeof(float);
  gather.places_at_ = segment_bytes;
  gather.factors_at_ = segment_bytes + place_bytes;
  const size_t table_bytes = CeilDiv(segment_bytes + place_bytes + factor_bytes, 16) * 16;
  gather.inlined_ = table_bytes <= kManyTables;
  for (GatherArgs& args : gather.launches_) args.table_bytes = static_cast<uint32_t>(table_bytes);
  gather.tables_.resize(!gather.inlined_            ? table_bytes
                        : table_bytes <= kFewTables ? kFewTables
                                                    : kManyTables);
  std::byte* table = gather.tables_.data();
  const auto append = [&](const auto& entry) {
    std::memcpy(table, &entry, sizeof(entry));
    table += sizeof(entry);
  };
  for (const CopySegment& segment : plan.segments) append(GatherPair{segment.src, segment.dst});
  for (const CopyPlace& place : plan.places) {
    append(
        GatherPair{reinterpret_cast<uintptr_t>(src_regions[place.src_region]) + place.src_offset,
                   reinterpret_cast<uintptr_t>(dst_regions[place.dst_region]) + place.dst_offset});
  }
  for (const float factor : plan.factors) append(factor);
  gather.PointTo(0);
  return gather;
}

void GatherCuda::PointTo(uintptr_t base) {
  for (GatherArgs& args : launches_) {
    args.tables = {.segments = reinterpret_cast<const GatherPair*>(base),
                   .places = reinterpret_cast<const GatherPair*>(base + places_at_),
                   .factors = reinterpret_cast<const float*>(base + factors_at_)};
  }
}

Status GatherCuda::Upload(void* tables, Stream stream) {
  if (inlined_) return Status::Ok();
  PointTo(reinterpret_cast<uintptr_t>(tables));
  return CudaStatus(cudaMemcpyAsync(tables, tables_.data(), tables_.size(), cudaMemcpyHostToDevice,
                                    static_cast<cudaStream_t>(stream)),
                    "uploading a copy plan");
}

Status GatherCuda::Launch(Stream stream) const {
  for (const GatherArgs& args : launches_) {
    const auto on = static_cast<cudaStream_t>(stream);
    const auto inlined = inlined_ ? std::span(tables_) : std::span<const std::byte>();
    const cudaError_t error =
        args.casts ? LaunchGatherCast(args, inlined, on) : LaunchGatherCopy(args, inlined, on);
    KVRELAY_RETURN_IF_ERROR(CudaStatus(error, "launching a gather"));
  }
  return Status::Ok();
}

void GatherCuda::SayEnd(const GatherEnd& end) {
  if (!launches_.empty()) launches_.back().end = end;
}

}  // namespace kvrelay::cuda
