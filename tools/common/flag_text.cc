#include "tools/common/flag_text.h"

#include <algorithm>
#include <cctype>
#include <charconv>
#include <numeric>

namespace kvrelay::tools {

std::string FlagName(std::string_view as_written) {
  as_written.remove_prefix(std::min(as_written.find_first_not_of('-'), as_written.size()));
  std::string name(as_written);
  std::replace(name.begin(), name.end(), '-', '_');
  return name;
}

std::string EnvironmentName(std::string_view flag_name) {
  std::string name = "KVRELAY_";
  for (const char c : flag_name) {
    name += static_cast<char>(std::toupper(static_cast<unsigned char>(c)));
  }
  return name;
}

std::optional<uint64_t> ParseWhole(std::string_view text) {
  uint64_t value = 0;
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), value);
  if (text.empty() || error != std::errc() || end != text.data() + text.size()) return std::nullopt;
  return value;
}

std::string_view Trim(std::string_view text) {
  constexpr std::string_view kBlank = " \t\r\n";
  const size_t first = text.find_first_not_of(kBlank);
  if (first == std::string_view::npos) return {};
  return text.substr(first, text.find_last_not_of(kBlank) - first + 1);
}

std::string Join(const std::vector<std::string>& parts, std::string_view between) {
  std::string text;
  for (size_t i = 0; i < parts.size(); ++i) {
    if (i > 0) text += between;
    text += parts[i];
  }
  return text;
}

size_t EditDistance(std::string_view a, std::string_view b) {
  std::vector<size_t> row(b.size() + 1);
  std::iota(row.begin(), row.end(), size_t{0});
  for (size_t i = 1; i <= a.size(); ++i) {
    size_t diagonal = row[0];
    row[0] = i;
    for (size_t j = 1; j <= b.size(); ++j) {
      const size_t change = diagonal + (a[i - 1] == b[j - 1] ? 0 : 1);
      diagonal = row[j];
      row[j] = std::min({row[j] + 1, row[j - 1] + 1, change});
    }
  }
  return row[b.size()];
}

std::string HelpEntry(std::string_view head, std::string_view text, size_t column) {
  constexpr size_t kWidth = 100;
  std::string out = "  " + std::string(head);
  size_t at = out.size();
  const auto indent = [&] {
    out += '\n' + std::string(column, ' ');
    at = column;
  };
  if (text.empty()) return out + '\n';
  if (at + 1 > column) {
    indent();
  } else {
    out += std::string(column - at, ' ');
    at = column;
  }
  while (!text.empty()) {
    const size_t space = std::min(text.find(' '), text.size());
    if (at > column && at + 1 + space > kWidth) indent();
    if (at > column) {
      out += ' ';
      ++at;
    }
    out += text.substr(0, space);
    at += space;
    text.remove_prefix(std::min(space + 1, text.size()));
  }
  return out + '\n';
}

}  // namespace kvrelay::tools
