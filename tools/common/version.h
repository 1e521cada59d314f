// What `--version` prints.
#pragma once

#include <string>

namespace kvrelay::tools {

// base/build_info's lines, then the libraries loaded now: they may be others than the ones built
// against.
std::string FullVersionText();

}  // namespace kvrelay::tools
