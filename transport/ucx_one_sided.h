// Which of UCX's transports read another process's memory without that process's help, on this host
// with this UCX.
#pragma once

#include <string>

#include "base/status.h"

namespace kvrelay::transport {

struct OneSidedLanes {
  std::string transports;  // as UCX's option TLS wants it
  std::string devices;     // as NET_DEVICES does
  std::string names;       // for people: "cma", "RDMA (mlx5_0)"
  bool cross_hosts = false;
};

// An RDMA device that is `data_interface` (never without one: its fabric trusts whoever is on it,
// like every data network), and cma, the kernel's copy between processes of one user and host, from
// UCX 1.22 on: before, it left reads of ordinary memory to the owner's processor. kRefused with the
// reason when there is neither.
Result<OneSidedLanes> FindOneSidedLanes(const std::string& data_interface);

}  // namespace kvrelay::transport
