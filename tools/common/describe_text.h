// A daemon's description for people.
#pragma once

#include <string>

#include "tools/common/describe.h"

namespace kvrelay::tools {

// Headings and tables, about 100 columns; lists that are empty take no room. `bold` marks headings
// for a terminal.
std::string DescriptionText(const Description& description, bool bold);

}  // namespace kvrelay::tools
