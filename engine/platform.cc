#include "engine/platform.h"

#include "engine/attn_backend.h"

namespace kvrelay::engine {
namespace {

class Host final : public Platform {
 public:
  DType dtype() const override { return DType::kFp32; }
  std::shared_ptr<Device> device(uint32_t /*rank*/) const override { return nullptr; }
  Status Check(const EngineOptions& /*options*/) const override { return Status::Ok(); }
  Result<attention::BackendChoice> ChooseAttnBackend(const ModelConfig& config,
                                                     const EngineOptions& options) const override {
    return engine::ChooseAttnBackend(config, options);
  }
  Result<ModelShards> Build(const ModelConfig& config, const Checkpoint& checkpoint,
                            const EngineOptions& /*options*/, std::span<const Stage> stages,
                            std::span<const KvView> caches) const override {
    KVRELAY_ASSIGN_OR_RETURN(const ModelBuilder build, FindArchitecture(config));
    return build(config, checkpoint, stages, caches);
  }
};

}  // namespace

std::shared_ptr<const Platform> HostPlatform() {
  static const auto host = std::make_shared<const Host>();
  return host;
}

}  // namespace kvrelay::engine
