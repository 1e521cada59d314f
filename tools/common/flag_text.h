// The text side of flags: names, numbers, help lines.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

namespace kvrelay::tools {

// "--max-new-tokens" -> "max_new_tokens".
std::string FlagName(std::string_view as_written);
// "max_new_tokens" -> "KVRELAY_MAX_NEW_TOKENS".
std::string EnvironmentName(std::string_view flag_name);

// Decimal digits only, no sign, no blank; nothing when it does not fit.
std::optional<uint64_t> ParseWhole(std::string_view text);

std::string_view Trim(std::string_view text);
std::string Join(const std::vector<std::string>& parts, std::string_view between);

// Letters to insert, remove or change to make one word the other.
size_t EditDistance(std::string_view a, std::string_view b);

// "  head      text" with the text wrapped at 100 columns behind `column`.
std::string HelpEntry(std::string_view head, std::string_view text, size_t column);

}  // namespace kvrelay::tools
