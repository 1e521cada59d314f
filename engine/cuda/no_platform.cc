// Of builds without CUDA.
#include "base/build_info.h"
#include "engine/cuda/platform_cuda.h"

namespace kvrelay::engine::cuda {

Result<std::shared_ptr<const Platform>> OpenPlatform(const PlatformOptions& /*options*/) {
  return Error(Code::kRefused, "this kvrelay was built without CUDA (" +
                                   std::string(GetBuildInfo().cuda_version) + ")");
}

}  // namespace kvrelay::engine::cuda
