// Which UCX this process runs with.
#pragma once

#include <string>
#include <string_view>

#include "base/status.h"

namespace kvrelay::transport {

// Of the library that was loaded, not of the headers: "1.22.0".
std::string UcxVersion();
// "ucx 1.22.0", for addresses.
std::string UcxLibrary();

// kIncompatible unless a peer's UcxLibrary() is of our release. UCX's addresses are for its own
// release: one of 1.22 ends a process with 1.13 that tries to read it.
Status CheckSameRelease(std::string_view library);

}  // namespace kvrelay::transport
