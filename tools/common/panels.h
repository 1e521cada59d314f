// Several texts side by side while they grow.
#pragma once

#include <cstddef>
#include <string>
#include <vector>

namespace kvrelay::tools {

struct Panel {
  std::string title;
  std::string text;
};

// Text broken into lines of at most `width` columns, at blanks where there are any; newlines stay.
// Control characters become blanks: what a model writes must not move a terminal's cursor.
std::vector<std::string> Wrap(const std::string& text, size_t width);

// The panels as rows of columns at least 36 wide, each with its title and the end of its text, in
// at most `height` lines (or one line of text each).
std::vector<std::string> LayOutPanels(const std::vector<Panel>& panels, size_t width,
                                      size_t height);

// Lines of a terminal that are written again in place. Owned by one thread.
class LiveLines {
 public:
  // Replaces what Show wrote last. Never fewer lines than then.
  void Show(const std::vector<std::string>& lines);

 private:
  size_t shown_ = 0;
};

struct ScreenSize {
  size_t columns = 100;
  size_t rows = 40;
};
// Of the terminal at stdout; the defaults when it does not tell.
ScreenSize TerminalSize();

}  // namespace kvrelay::tools
