// What this binary was built from and against. Values are fixed when the build is configured; tools
// add what is loaded at run time (UCX and ZeroMQ may be other versions then).
#pragma once

#include <string>
#include <string_view>

namespace kvrelay {

struct BuildInfo {
  std::string_view version;       // "0.1.0"
  std::string_view git;           // commit, "-dirty" when files differed; "unknown" without git
  std::string_view build_type;    // "Release"
  std::string_view sanitize;      // "address,undefined"; empty without sanitizers
  std::string_view compiler;      // "GNU 12.2.0"
  std::string_view ucx_version;   // of the headers: "1.22"
  std::string_view ucx_root;      // "system", or the folder that KVRELAY_UCX_ROOT named
  std::string_view zmq_version;   // of the headers: "4.3.4"
  std::string_view cuda_version;  // of the toolkit, or "off"
};

const BuildInfo& GetBuildInfo();

// One fact a line, "kvrelay 0.1.0 (3f2a91c)" first; ends with a newline. For `--version`.
std::string VersionText();

}  // namespace kvrelay
