#include "transport/ucx_version.h"

#include <ucp/api/ucp.h>

namespace kvrelay::transport {

std::string UcxVersion() { return ucp_get_version_string(); }

}  // namespace kvrelay::transport
