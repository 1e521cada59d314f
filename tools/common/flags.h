// Command line flags as every program here understands them: gflags' spelling (--flag=v, --flag v,
// --switch, --noswitch, dashes or underscores), with what gflags itself does not give: flags of one
// command only, errors as values, repeated and stray arguments refused, and where each value came
// from.
//
// A value is taken from the command line, else from --flagfile=FILE (one --flag=v a line, #
// comments), else from the environment (KVRELAY_<FLAG>), else it is the default: what the bound
// variable held when the flag was declared.
#pragma once

#include <cstdint>
#include <functional>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <type_traits>
#include <vector>

#include "base/status.h"

namespace kvrelay::tools {

// One flag's value and its origin, as `inspect` shows it.
struct EffectiveFlag {
  std::string name;
  std::string value;
  std::string source;  // "flag", "file prod.flags:3", "environment KVRELAY_TP", "default"
};

// Value of an environment variable, or nothing.
using Environment = std::function<std::optional<std::string>(const std::string& name)>;
Environment ProcessEnvironment();

// What the command line asked for.
enum class Action : uint8_t { kRun, kHelp, kVersion };

class FlagSet {
 public:
  // Stores a value or says what would have been right ("needs a whole number from 1 to 64").
  using Setter = std::function<Status(std::string_view value)>;

  // `usage` follows "Usage: " in the help; its words before the first flag name the program in
  // messages.
  FlagSet(std::string usage, std::string about, std::string example);

  // Declarations. Targets outlive Parse. `help` is one sentence with the unit where there is one.
  void Section(std::string title);
  void Text(std::string name, std::string* target, std::string placeholder, std::string help);
  void Choice(std::string name, std::string* target, std::vector<std::string> choices,
              std::string help);
  void Switch(std::string name, bool* target, std::string help);
  void Real(std::string name, double* target, double min, double max, std::string help);
  template <typename T>
  void Whole(std::string name, T* target, std::type_identity_t<T> min, std::type_identity_t<T> max,
             std::string help) {
    static_assert(std::is_unsigned_v<T>);
    WholeAs(
        std::move(name), min, max, *target, [target](uint64_t v) { *target = static_cast<T>(v); },
        std::move(help));
  }
  // Comma-separated whole numbers below 2^32. Empty is the empty list.
  void Ids(std::string name, std::vector<uint32_t>* target, std::string help);
  void Custom(std::string name, std::string placeholder, std::string default_text, Setter setter,
              std::string help);
  // The one argument without dashes that the command takes. Required.
  void Argument(std::string placeholder, std::string* target, std::string help);

  // `args` without the program's and the command's name. kInvalidArgument names the flag, its value
  // and what would be right.
  // --help and --version win over errors.
  Result<Action> Parse(std::span<const std::string> args, const Environment& environment);

  std::string Help() const;
  // True when the flag was given in any way, its default included in none.
  bool Given(std::string_view name) const;
  std::vector<EffectiveFlag> Effective() const;
  const std::string& program() const { return program_; }

 private:
  struct Flag {
    std::string name;
    std::string placeholder;  // empty for switches
    std::string help;
    std::string value;   // as text; the default until something is set
    std::string source;  // "default" until something is set
    Setter set;
    size_t section = 0;
    bool is_switch = false;
  };

  void WholeAs(std::string name, uint64_t min, uint64_t max, uint64_t default_value,
               std::function<void(uint64_t)> store, std::string help);
  Flag* Find(std::string_view name);
  const Flag* Find(std::string_view name) const;
  Status Assign(Flag& flag, std::string value, const std::string& source);
  Status UnknownFlag(std::string_view as_written) const;
  Status ParseArgs(std::span<const std::string> args);
  Status ParseFile(const std::string& path);
  Status ParseEnvironment(const Environment& environment);

  std::string program_;
  std::string usage_;
  std::string about_;
  std::string example_;
  std::vector<std::string> sections_;
  std::vector<Flag> flags_;
  std::string flagfile_;
  std::string* argument_ = nullptr;
  std::string argument_placeholder_;
  std::string argument_help_;
};

// Whether the failure of a command with these arguments is to be JSON: readable even when they do
// not parse.
bool AsksForJson(std::span<const std::string> args);

}  // namespace kvrelay::tools
