// What `kvrelay demo` prints.
#pragma once

#include <string>
#include <vector>

#include "tools/kvrelay/answer.h"
#include "tools/kvrelay/demo_daemons.h"

namespace kvrelay::tools {

struct DemoRequest {
  proto::Generate request;
  Answer answer;  // by the two daemons
  Answer local;   // by one process

  bool identical() const { return answer.token_ids == local.token_ids; }
};

// Colours for a terminal, nothing for a file or with NO_COLOR set.
class Paint {
 public:
  explicit Paint(bool on) : on_(on) {}
  std::string Bold(const std::string& text) const { return With("1", text); }
  std::string Dim(const std::string& text) const { return With("2", text); }
  std::string Good(const std::string& text) const { return With("1;32", text); }
  std::string Bad(const std::string& text) const { return With("1;31", text); }

 private:
  std::string With(const char* code, const std::string& text) const {
    return on_ ? "\033[" + std::string(code) + "m" + text + "\033[0m" : text;
  }
  bool on_;
};

std::string DemoBanner(const DemoDaemons& daemons, const std::string& model, const Paint& paint);
std::string DemoPrompts(const std::vector<DemoRequest>& requests, const Paint& paint);
// What each request pulled, and how long its stages took.
std::string DemoTable(const std::vector<DemoRequest>& requests, const Paint& paint);
// "identical: 4 of 4 requests, 384 tokens", and where it is not so the first token that differs.
std::string DemoVerdict(const std::vector<DemoRequest>& requests, const Paint& paint);
bool AllIdentical(const std::vector<DemoRequest>& requests);

std::string DemoJson(const DemoDaemons& daemons, const std::string& model,
                     const std::vector<DemoRequest>& requests);

}  // namespace kvrelay::tools
