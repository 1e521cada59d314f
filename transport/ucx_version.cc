#include "transport/ucx_version.h"

#include <ucp/api/ucp.h>

namespace kvrelay::transport {

std::string UcxVersion() { return ucp_get_version_string(); }
std::string UcxLibrary() { return "ucx " + UcxVersion(); }

Status CheckSameRelease(std::string_view library) {
  const auto release = [](std::string_view text) { return text.substr(0, text.rfind('.')); };
  const std::string own = UcxLibrary();
  if (release(library) == release(own)) return {};
  return Error(Code::kIncompatible, "the peer has " + std::string(library) + ", we have " + own);
}

}  // namespace kvrelay::transport
