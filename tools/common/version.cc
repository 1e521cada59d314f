#include "tools/common/version.h"

#include <ucp/api/ucp.h>
#include <zmq.h>

#include "base/build_info.h"

namespace kvrelay::tools {

std::string FullVersionText() {
  int major = 0;
  int minor = 0;
  int patch = 0;
  ::zmq_version(&major, &minor, &patch);
  return VersionText() + "loaded: UCX " + ::ucp_get_version_string() + ", ZeroMQ " +
         std::to_string(major) + "." + std::to_string(minor) + "." + std::to_string(patch) + "\n";
}

}  // namespace kvrelay::tools
