#include "base/build_info.h"

namespace kvrelay {

std::string VersionText() {
  const BuildInfo& info = GetBuildInfo();
  std::string text;
  const auto line = [&text](auto... parts) { (text.append(parts), ...).append("\n"); };
  line("kvrelay ", info.version, " (", info.git, ")");
  line("build: ", info.build_type, info.sanitize.empty() ? "" : " -fsanitize=", info.sanitize, ", ",
       info.compiler);
  line("UCX: ", info.ucx_version, " (", info.ucx_root, ")");
  line("ZeroMQ: ", info.zmq_version);
  line("CUDA: ", info.cuda_version);
  return text;
}

}  // namespace kvrelay
