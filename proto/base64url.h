// RFC 4648 section 5 without padding. Private to proto/.
#pragma once

#include <optional>
#include <string>
#include <string_view>

namespace kvrelay::proto {

std::string ToBase64Url(std::string_view bytes);
// Nothing unless `text` is what ToBase64Url makes of some bytes.
std::optional<std::string> FromBase64Url(std::string_view text);

}  // namespace kvrelay::proto
