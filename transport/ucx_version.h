// Which UCX this process runs with.
#pragma once

#include <string>

namespace kvrelay::transport {

// Of the library that was loaded, not of the headers: "1.22.0".
std::string UcxVersion();

}  // namespace kvrelay::transport
