// Where an engine's ranks compute and keep their caches: the host, or GPUs
// (engine/cuda/platform_cuda.h).
#pragma once

#include <cstdint>
#include <memory>
#include <span>

#include "attention/backend.h"
#include "base/status.h"
#include "engine/checkpoint.h"
#include "engine/engine_options.h"
#include "engine/model.h"
#include "engine/model_config.h"
#include "engine/pipeline.h"
#include "kvcache/device.h"
#include "kvcache/kv_view.h"

namespace kvrelay::engine {

// Any thread.
class Platform {
 public:
  virtual ~Platform() = default;

  // The arithmetic's type, and the cache's where no flag names one.
  virtual DType dtype() const = 0;
  // That holds the cache of `rank`; null: the host.
  virtual std::shared_ptr<Device> device(uint32_t rank) const = 0;
  // kInvalidArgument names the flag that cannot be followed for so many ranks.
  virtual Status Check(const EngineOptions& options) const = 0;
  // Errors as attention::GetAttnBackend.
  virtual Result<attention::BackendChoice> ChooseAttnBackend(
      const ModelConfig& config, const EngineOptions& options) const = 0;
  // The shards of all ranks of the stages. Groups of `stages` and `caches` (by rank, on their
  // devices) outlive them. kInvalidArgument for a model that is not known here.
  virtual Result<ModelShards> Build(const ModelConfig& config, const Checkpoint& checkpoint,
                                    const EngineOptions& options, std::span<const Stage> stages,
                                    std::span<const KvView> caches) const = 0;
};

// fp32 on this machine's processors.
std::shared_ptr<const Platform> HostPlatform();

}  // namespace kvrelay::engine
