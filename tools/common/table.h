// Columns of text for people.
#pragma once

#include <string>
#include <vector>

namespace kvrelay::tools {

// Left-aligned columns, two blanks between, widths by content (UTF-8 code points). Cells of numeric
// columns are right-aligned: a header that starts with '>' marks one.
class Table {
 public:
  explicit Table(std::vector<std::string> header);
  // As many cells as the header has.
  void Row(std::vector<std::string> cells);
  bool empty() const { return rows_.empty(); }
  // Every line starts with `indent`.
  std::string Text(const std::string& indent) const;

 private:
  std::vector<std::string> header_;
  std::vector<bool> right_;
  std::vector<std::vector<std::string>> rows_;
};

}  // namespace kvrelay::tools
