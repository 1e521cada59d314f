#include "engine/cuda/attention_step.h"

#include <algorithm>
#include <utility>

namespace kvrelay::engine::cuda {
namespace {

namespace attn = attention::cuda;

attn::RelayShape RelayShapeOf(const AttentionShape& shape) {
  return {.query_heads = shape.query_heads,
          .kv_heads = shape.kv_heads,
          .head_dim = shape.head_dim,
          .dtype = shape.dtype,
          .block_size = shape.limits.block_size,
          .max_requests = shape.limits.sequences,
          .max_prefixes = shape.limits.sequences,
          .scale = shape.scale};
}

attn::PagedShape PagedShapeOf(const AttentionShape& shape, uint32_t window) {
  return {.query_heads = shape.query_heads,
          .kv_heads = shape.kv_heads,
          .head_dim = shape.head_dim,
          .dtype = shape.dtype,
          .cache_dtype = shape.cache_dtype,
          .block_size = shape.limits.block_size,
          .max_sequences = shape.limits.sequences,
          .max_rows = shape.limits.rows,
          .scale = shape.scale,
          .window = window};
}

template <typename Kernels>
Status Serves(Result<Kernels> kernels) {
  return kernels ? Status::Ok() : kernels.error();
}

CacheLayer CacheOf(const KvView& kv, uint32_t layer) {
  const KvLayout& layout = kv.layout();
  return {.k = kv.K(layer, 0, 0, 0),
          .v = kv.V(layer, 0, 0, 0),
          .block_stride = layout.block_stride,
          .head_stride = layout.head_stride,
          .token_stride = layout.token_stride,
          .block_size = layout.block_size,
          .dtype = layout.dtype};
}

}  // namespace

Status RelayServes(const AttentionShape& shape) {
  if (shape.cache_dtype != shape.dtype) {
    return {Code::kIncompatible, "a " + std::string(DTypeName(shape.cache_dtype)) +
                                     " cache, but arithmetic in " +
                                     std::string(DTypeName(shape.dtype))};
  }
  if (std::ranges::any_of(shape.windows, [](uint32_t window) { return window > 0; })) {
    return {Code::kIncompatible, "layers with a sliding window"};
  }
  return Serves(attn::RelayKernels::Create(RelayShapeOf(shape)));
}

Status PagedServes(const AttentionShape& shape) {
  return Serves(attn::PagedKernels::Create(PagedShapeOf(shape, 0)));
}

Result<AttentionStep> AttentionStep::Create(const AttentionShape& shape, const KvView& kv,
                                            attn::RelayMode relay) {
  AttentionStep step;
  const auto workspace = [](size_t bytes) {
    return AllocateDevice<std::byte>(bytes, "attention's workspace");
  };
  if (relay != attn::RelayMode::kNever) {
    KVRELAY_ASSIGN_OR_RETURN(attn::RelayKernels kernels,
                             attn::RelayKernels::Create(RelayShapeOf(shape)));
    KVRELAY_ASSIGN_OR_RETURN(auto memory, workspace(kernels.workspace_bytes()));
    step.relay_.emplace(Relay{std::move(kernels), relay, std::move(memory)});
  }
  std::vector<uint32_t> windows = shape.windows;
  std::ranges::sort(windows);
  windows.erase(std::ranges::unique(windows).begin(), windows.end());
  for (const uint32_t window : windows) {
    KVRELAY_ASSIGN_OR_RETURN(attn::PagedKernels kernels,
                             attn::PagedKernels::Create(PagedShapeOf(shape, window)));
    KVRELAY_ASSIGN_OR_RETURN(auto memory, workspace(kernels.workspace_bytes()));
    step.paged_.push_back({std::move(kernels), std::move(memory)});
  }
  for (uint32_t i = 0; i < shape.windows.size(); ++i) {
    Layer layer;
    layer.cache = CacheOf(kv, i);
    layer.paged.cache = {.k = layer.cache.k,
                         .v = layer.cache.v,
                         .num_blocks = kv.layout().num_blocks,
                         .block_stride = layer.cache.block_stride,
                         .head_stride = layer.cache.head_stride,
                         .token_stride = layer.cache.token_stride};
    if (step.relay_) {
      KVRELAY_ASSIGN_OR_RETURN(layer.maps, step.relay_->kernels.MapLayer(layer.paged.cache));
    }
    layer.window =
        static_cast<size_t>(std::ranges::lower_bound(windows, shape.windows[i]) - windows.begin());
    step.layers_.push_back(layer);
  }
  return step;
}

Status AttentionStep::Schedule(const StepInputs& inputs, bool single_rows,
                               cudaStream_t stream) const {
  const attn::PagedBatch batch = inputs.batch(single_rows);
  if (single_rows && relay_) {
    return relay_->kernels.Schedule(batch.requests, relay_->mode, relay_->workspace.get(), stream);
  }
  for (const Paged& paged : paged_) {
    KVRELAY_RETURN_IF_ERROR(paged.kernels.Schedule(batch, paged.workspace.get(), stream));
  }
  return Status::Ok();
}

Status AttentionStep::Attend(uint32_t layer, const StepInputs& inputs, bool single_rows,
                             const void* q, void* out, float* lse, cudaStream_t stream) const {
  const attn::PagedBatch batch = inputs.batch(single_rows);
  const Layer& of = layers_[layer];
  if (single_rows && relay_) {
    return relay_->kernels.Attend(of.maps, batch.requests, q, out, lse, relay_->workspace.get(),
                                  stream);
  }
  const Paged& paged = paged_[of.window];
  return paged.kernels.Attend(of.paged, batch, q, out, lse, paged.workspace.get(), stream);
}

}  // namespace kvrelay::engine::cuda
