#include "tools/common/panels.h"

#include <sys/ioctl.h>
#include <unistd.h>

#include <algorithm>

#include "tools/common/output.h"

namespace kvrelay::tools {
namespace {

constexpr size_t kLeastPanelWidth = 36;
constexpr size_t kGap = 3;

bool ContinuesCharacter(char c) { return (static_cast<unsigned char>(c) & 0xC0U) == 0x80U; }

size_t Columns(const std::string& text) {
  return static_cast<size_t>(
      std::count_if(text.begin(), text.end(), [](char c) { return !ContinuesCharacter(c); }));
}

// Bytes of the longest head of `text` that has at most `columns` characters.
size_t BytesOf(const std::string& text, size_t columns) {
  size_t at = 0;
  while (at < text.size()) {
    if (!ContinuesCharacter(text[at])) {
      if (columns == 0) break;
      --columns;
    }
    ++at;
  }
  return at;
}

std::string Fit(const std::string& text, size_t width) {
  std::string fitted = text.substr(0, BytesOf(text, width));
  return fitted + std::string(width - Columns(fitted), ' ');
}

}  // namespace

std::vector<std::string> Wrap(const std::string& text, size_t width) {
  std::vector<std::string> lines = {""};
  for (const char c : text) {
    if (c == '\n') {
      lines.emplace_back();
      continue;
    }
    const bool is_control = static_cast<unsigned char>(c) < 0x20 || c == 0x7F;
    std::string& line = lines.back();
    line += is_control ? ' ' : c;
    if (ContinuesCharacter(c) || Columns(line) <= width) continue;
    // The last word goes to the next line, unless it is all there is.
    const size_t blank = line.rfind(' ');
    const size_t cut = blank == std::string::npos || blank == 0 ? BytesOf(line, width) : blank;
    std::string rest = line.substr(cut);
    line.erase(cut);
    rest.erase(0, rest.find_first_not_of(' ') == std::string::npos ? rest.size()
                                                                   : rest.find_first_not_of(' '));
    lines.push_back(std::move(rest));
  }
  return lines;
}

std::vector<std::string> LayOutPanels(const std::vector<Panel>& panels, size_t width,
                                      size_t height) {
  if (panels.empty()) return {};
  const size_t a_row =
      std::clamp<size_t>((width + kGap) / (kLeastPanelWidth + kGap), 1, panels.size());
  const size_t rows = (panels.size() + a_row - 1) / a_row;
  const size_t column = (width + kGap) / a_row - kGap;
  std::vector<std::vector<std::string>> texts;
  size_t longest = 1;
  for (const Panel& panel : panels) {
    texts.push_back(Wrap(panel.text, column));
    longest = std::max(longest, texts.back().size());
  }
  // A title above and an empty line below.
  const size_t text_lines = std::clamp<size_t>(height / rows, 3, longest + 2) - 2;

  std::vector<std::string> lines;
  for (size_t first = 0; first < panels.size(); first += a_row) {
    std::vector<std::string> out(text_lines + 1);
    for (size_t i = first; i < std::min(first + a_row, panels.size()); ++i) {
      std::vector<std::string>& text = texts[i];
      if (text.size() > text_lines) {
        text.erase(text.begin(), text.end() - static_cast<ptrdiff_t>(text_lines));
      }
      text.resize(text_lines);
      text.insert(text.begin(), panels[i].title);
      for (size_t line = 0; line < out.size(); ++line) {
        out[line] += Fit(text[line], column) + std::string(kGap, ' ');
      }
    }
    for (std::string& line : out) {
      line.erase(line.find_last_not_of(' ') + 1);
      lines.push_back(std::move(line));
    }
    lines.emplace_back();
  }
  return lines;
}

void LiveLines::Show(const std::vector<std::string>& lines) {
  std::string out;
  if (shown_ > 0) out += "\033[" + std::to_string(shown_) + "A";
  for (const std::string& line : lines) out += "\r" + line + "\033[K\n";
  shown_ = lines.size();
  WriteOut(out);
}

ScreenSize TerminalSize() {
  winsize size = {};
  if (::ioctl(STDOUT_FILENO, TIOCGWINSZ, &size) != 0 || size.ws_col == 0 || size.ws_row == 0) {
    return {};
  }
  return {.columns = std::max<size_t>(size.ws_col, kLeastPanelWidth), .rows = size.ws_row};
}

}  // namespace kvrelay::tools
