#include "engine/cuda/platform_cuda.h"

#include <cuda_runtime_api.h>

#include <algorithm>
#include <map>
#include <string>
#include <utility>

#include "engine/cuda/blas.h"
#include "engine/cuda/llama_cuda.h"
#include "kvcache/cuda/device_cuda.h"

namespace kvrelay::engine::cuda {
namespace {

using attention::Backend;

// Each running request has at most one part in a step: a row, or a chunk of the prompt.
LlamaCudaOptions LlamaOptions(const ModelConfig& config, const EngineOptions& options,
                              DType dtype) {
  const uint32_t blocks = (config.max_position + options.block_size - 1) / options.block_size;
  return {.dtype = dtype,
          .graphs = !options.enforce_eager,
          .limits = {.rows = options.prefill_chunk + options.max_batch,
                     .sequences = options.max_batch,
                     .blocks = blocks,
                     .block_size = options.block_size}};
}

attention::cuda::RelayMode RelayModeOf(const EngineOptions& options, Backend backend) {
  using Mode = attention::cuda::RelayMode;
  if (backend != Backend::kRelay) return Mode::kNever;
  return options.relay == RelayMode::kOn ? Mode::kAlways : Mode::kAuto;
}

class Cuda final : public Platform {
 public:
  Cuda(PlatformOptions options, std::vector<std::shared_ptr<Device>> devices)
      : options_(std::move(options)), devices_(std::move(devices)) {}

  DType dtype() const override { return options_.dtype; }
  std::shared_ptr<Device> device(uint32_t rank) const override {
    return devices_[devices_.size() == 1 ? 0 : rank];
  }

  Status Check(const EngineOptions& options) const override {
    const uint64_t ranks = uint64_t{options.tp} * options.pp;
    if (devices_.size() != 1 && devices_.size() != ranks) {
      return {Code::kInvalidArgument, "device names " + std::to_string(devices_.size()) +
                                          " GPUs for " + std::to_string(ranks) +
                                          " ranks: one for all, or one for each"};
    }
    if (options.kv_cache == KvCacheKind::kVirtual) {
      return {Code::kInvalidArgument, "kv_cache = virtual is for device = cpu"};
    }
    if (SizeOf(CacheDType(options)) < 2) {
      return {Code::kInvalidArgument, "kv_dtype = " + std::string(DTypeName(*options.kv_dtype)) +
                                          " is for device = cpu; GPUs write fp32, fp16 or bf16"};
    }
    return Status::Ok();
  }

  Result<attention::BackendChoice> ChooseAttnBackend(const ModelConfig& config,
                                                     const EngineOptions& options) const override;
  Result<ModelShards> Build(const ModelConfig& config, const Checkpoint& checkpoint,
                            const EngineOptions& options, std::span<const Stage> stages,
                            std::span<const KvView> caches) const override;

 private:
  int ordinal(uint32_t rank) const {
    return options_.ordinals[options_.ordinals.size() == 1 ? 0 : rank];
  }
  DType CacheDType(const EngineOptions& options) const {
    return options.kv_dtype.value_or(options_.dtype);
  }

  const PlatformOptions options_;
  const std::vector<std::shared_ptr<Device>> devices_;
};

Result<attention::BackendChoice> Cuda::ChooseAttnBackend(const ModelConfig& config,
                                                         const EngineOptions& options) const {
  if (const auto known = FindArchitecture(config); !known) return Error(known.error());
  if (config.mla) {
    return Error(
        Code::kInvalidArgument,
        config.architecture + " (multi-head latent attention) runs with device = cpu alone");
  }
  KVRELAY_RETURN_IF_ERROR(CudaStatus(cudaSetDevice(ordinal(0)), "choosing a GPU"));
  KVRELAY_ASSIGN_OR_RETURN(const std::vector<Stage> stages, MakeStages(config, 1, options.tp, {}));
  KVRELAY_ASSIGN_OR_RETURN(const LlamaSplit split, LlamaSplit::Make(config, stages.front(), 0));
  const AttentionShape shape = AttentionShapeOf(
      config, split, LlamaOptions(config, options, options_.dtype), CacheDType(options));
  const auto why_not = [&](Backend backend) -> std::optional<std::string> {
    if (backend == Backend::kNaive) return "computes on the host";
    if (attention::TraitsOf(backend).mla_only) return "serves MLA only";
    if (backend == Backend::kRelay && options.relay == RelayMode::kOff) return "disabled";
    const Status serves = backend == Backend::kRelay ? RelayServes(shape) : PagedServes(shape);
    if (serves.ok()) return std::nullopt;
    return serves.message();
  };
  return attention::ChooseBackend(options.attn_backend, why_not, [&](Backend) {
    return std::string(DTypeName(shape.cache_dtype)) + " cache, " + device(0)->name();
  });
}

Result<ModelShards> Cuda::Build(const ModelConfig& config, const Checkpoint& checkpoint,
                                const EngineOptions& options, std::span<const Stage> stages,
                                std::span<const KvView> caches) const {
  KVRELAY_ASSIGN_OR_RETURN(const attention::BackendChoice backend,
                           ChooseAttnBackend(config, options));
  LlamaCudaOptions llama = LlamaOptions(config, options, options_.dtype);
  llama.relay = RelayModeOf(options, backend.backend);
  std::vector<int> ordinals;
  for (uint32_t rank = 0; rank < caches.size(); ++rank) ordinals.push_back(ordinal(rank));
  return BuildLlamaCuda(config, checkpoint, llama, stages, caches, ordinals);
}

}  // namespace

Result<std::shared_ptr<const Platform>> OpenPlatform(const PlatformOptions& options) {
  if (const auto blas = BlasLibrary::Load(); !blas) return Error(blas.error());
  std::map<int, std::shared_ptr<Device>> opened;
  std::vector<std::shared_ptr<Device>> devices;
  for (const int ordinal : options.ordinals) {
    std::shared_ptr<Device>& device = opened[ordinal];
    if (!device) {
      KVRELAY_ASSIGN_OR_RETURN(device, kvrelay::cuda::OpenDevice(ordinal));
    }
    devices.push_back(device);
  }
  return std::make_shared<const Cuda>(options, std::move(devices));
}

}  // namespace kvrelay::engine::cuda
