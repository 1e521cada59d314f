#include "transport/ucx_one_sided.h"

#include <ucp/api/ucp.h>
#include <uct/api/uct.h>

#include <filesystem>
#include <string_view>
#include <system_error>

#include "transport/ucx_version.h"

namespace kvrelay::transport {
namespace {

// Whether this UCX was built with the component, and it found a device or the right to do its work.
bool HasComponent(std::string_view name) {
  uct_component_h* components = nullptr;
  unsigned count = 0;
  if (uct_query_components(&components, &count) != UCS_OK) return false;
  bool found = false;
  for (unsigned i = 0; i < count; ++i) {
    uct_component_attr_t attributes{};
    attributes.field_mask =
        UCT_COMPONENT_ATTR_FIELD_NAME | UCT_COMPONENT_ATTR_FIELD_MD_RESOURCE_COUNT;
    if (uct_component_query(components[i], &attributes) != UCS_OK) continue;
    found |= name == attributes.name && attributes.md_resource_count > 0;
  }
  uct_release_component_list(components);
  return found;
}

// "mlx5_0" when the network interface belongs to an RDMA device, else empty.
std::string RdmaDeviceOf(const std::string& interface) {
  if (interface.empty()) return {};
  std::error_code none;
  const std::filesystem::directory_iterator devices(
      "/sys/class/net/" + interface + "/device/infiniband", none);
  return none || devices == end(devices) ? std::string() : devices->path().filename().string();
}

bool ReadsBySystemCall() {
  unsigned major = 0;
  unsigned minor = 0;
  unsigned patch = 0;
  ucp_get_version(&major, &minor, &patch);
  return major > 1 || (major == 1 && minor >= 22);
}

}  // namespace

Result<OneSidedLanes> FindOneSidedLanes(const std::string& data_interface) {
  OneSidedLanes lanes;
  lanes.devices = "all";
  std::string why;
  const std::string device = RdmaDeviceOf(data_interface);
  if (device.empty()) {
    why = "no RDMA device" + (data_interface.empty() ? "" : " behind " + data_interface);
  } else if (!HasComponent("ib")) {
    why = "UCX " + UcxVersion() + " here can not use the RDMA device " + device;
  } else {
    lanes.transports = "ib";
    lanes.devices = device + ":1";
    lanes.names = "RDMA (" + device + ")";
    lanes.cross_hosts = true;
  }
  if (!HasComponent("cma")) {
    why += "; no cma: this process may not read the memory of others";
  } else if (!ReadsBySystemCall()) {
    why += "; UCX " + UcxVersion() + " reads over cma with the owner's help only, 1.22 without";
  } else {
    // posix: two workers greet each other there before the first read.
    lanes.transports += lanes.transports.empty() ? "cma,posix" : ",cma,posix";
    lanes.names += lanes.names.empty() ? "cma" : " and cma";
  }
  if (lanes.transports.empty()) return Error(Code::kRefused, "nothing reads one-sided: " + why);
  return lanes;
}

}  // namespace kvrelay::transport
