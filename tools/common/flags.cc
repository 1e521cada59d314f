#include "tools/common/flags.h"

#include <algorithm>
#include <charconv>
#include <cmath>
#include <cstdlib>
#include <fstream>
#include <sstream>

#include "tools/common/flag_text.h"

namespace kvrelay::tools {
namespace {

constexpr uintmax_t kMaxFlagFileBytes = 1 << 20;

std::string JoinIds(const std::vector<uint32_t>& ids) {
  std::string text;
  for (const uint32_t id : ids) {
    if (!text.empty()) text += ',';
    text += std::to_string(id);
  }
  return text;
}

std::string RealText(double value) {
  std::ostringstream out;
  out << value;
  return out.str();
}

bool IsHelp(const std::string& arg) { return arg == "--help" || arg == "-help" || arg == "-h"; }
bool IsVersion(const std::string& arg) { return arg == "--version" || arg == "-version"; }

}  // namespace

Environment ProcessEnvironment() {
  return [](const std::string& name) -> std::optional<std::string> {
    const char* value = std::getenv(name.c_str());
    if (value == nullptr) return std::nullopt;
    return value;
  };
}

FlagSet::FlagSet(std::string usage, std::string about, std::string example)
    : usage_(std::move(usage)), about_(std::move(about)), example_(std::move(example)) {
  std::istringstream words(usage_);
  for (std::string word; words >> word;) {
    const bool is_name =
        std::all_of(word.begin(), word.end(), [](char c) { return c >= 'a' && c <= 'z'; });
    if (!is_name) break;
    program_ += (program_.empty() ? "" : " ") + word;
  }
  Section("Flags");
}

void FlagSet::Section(std::string title) { sections_.push_back(std::move(title)); }

void FlagSet::Custom(std::string name, std::string placeholder, std::string default_text,
                     Setter setter, std::string help) {
  flags_.push_back({.name = std::move(name),
                    .placeholder = std::move(placeholder),
                    .help = std::move(help),
                    .value = std::move(default_text),
                    .source = "default",
                    .set = std::move(setter),
                    .section = sections_.size() - 1,
                    .is_switch = false});
}

void FlagSet::Text(std::string name, std::string* target, std::string placeholder,
                   std::string help) {
  Custom(
      std::move(name), std::move(placeholder), *target,
      [target](std::string_view value) {
        *target = value;
        return Status::Ok();
      },
      std::move(help));
}

void FlagSet::Choice(std::string name, std::string* target, std::vector<std::string> choices,
                     std::string help) {
  const std::string all = Join(choices, "|");
  Custom(
      std::move(name), all, *target,
      [target, choices = std::move(choices), all](std::string_view value) -> Status {
        if (std::find(choices.begin(), choices.end(), value) == choices.end()) {
          return Error(Code::kInvalidArgument, "needs one of " + all);
        }
        *target = value;
        return Status::Ok();
      },
      std::move(help));
}

void FlagSet::Switch(std::string name, bool* target, std::string help) {
  Custom(
      std::move(name), "", *target ? "true" : "false",
      [target](std::string_view value) -> Status {
        const bool yes = value == "true" || value == "1" || value == "yes";
        if (!yes && value != "false" && value != "0" && value != "no") {
          return Error(Code::kInvalidArgument, "needs true or false");
        }
        *target = yes;
        return Status::Ok();
      },
      std::move(help));
  flags_.back().is_switch = true;
}

void FlagSet::Real(std::string name, double* target, double min, double max, std::string help) {
  Custom(
      std::move(name), "X", RealText(*target),
      [target, min, max](std::string_view text) -> Status {
        double value = 0;
        const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), value);
        if (error != std::errc() || end != text.data() + text.size() || std::isnan(value) ||
            value < min || value > max) {
          return Error(Code::kInvalidArgument,
                       "needs a number from " + RealText(min) + " to " + RealText(max));
        }
        *target = value;
        return Status::Ok();
      },
      std::move(help));
}

void FlagSet::WholeAs(std::string name, uint64_t min, uint64_t max, uint64_t default_value,
                      std::function<void(uint64_t)> store, std::string help) {
  Custom(
      std::move(name), "N", std::to_string(default_value),
      [min, max, store = std::move(store)](std::string_view text) -> Status {
        const std::optional<uint64_t> value = ParseWhole(text);
        if (!value || *value < min || *value > max) {
          return Error(Code::kInvalidArgument, "needs a whole number from " + std::to_string(min) +
                                                   " to " + std::to_string(max));
        }
        store(*value);
        return Status::Ok();
      },
      std::move(help));
}

void FlagSet::Ids(std::string name, std::vector<uint32_t>* target, std::string help) {
  Custom(
      std::move(name), "1,2,3", JoinIds(*target),
      [target](std::string_view text) -> Status {
        std::vector<uint32_t> ids;
        while (!text.empty()) {
          const size_t comma = text.find(',');
          const std::optional<uint64_t> id = ParseWhole(text.substr(0, comma));
          const bool ends_in_comma = comma != std::string_view::npos && comma + 1 == text.size();
          if (!id || *id > UINT32_MAX || ends_in_comma) {
            return Error(Code::kInvalidArgument,
                         "needs whole numbers with commas between, like 1,2,3");
          }
          ids.push_back(static_cast<uint32_t>(*id));
          text.remove_prefix(comma == std::string_view::npos ? text.size() : comma + 1);
        }
        *target = std::move(ids);
        return Status::Ok();
      },
      std::move(help));
}

void FlagSet::Argument(std::string placeholder, std::string* target, std::string help) {
  argument_placeholder_ = std::move(placeholder);
  argument_ = target;
  argument_help_ = std::move(help);
}

FlagSet::Flag* FlagSet::Find(std::string_view name) {
  return const_cast<Flag*>(std::as_const(*this).Find(name));
}

const FlagSet::Flag* FlagSet::Find(std::string_view name) const {
  const auto it = std::find_if(flags_.begin(), flags_.end(),
                               [name](const Flag& flag) { return flag.name == name; });
  return it == flags_.end() ? nullptr : &*it;
}

bool FlagSet::Given(std::string_view name) const {
  const Flag* flag = Find(name);
  return flag != nullptr && flag->source != "default";
}

Status FlagSet::UnknownFlag(std::string_view as_written) const {
  std::string message = "unknown flag " + std::string(as_written);
  const std::string name = FlagName(as_written);
  const Flag* nearest = nullptr;
  size_t least = std::max<size_t>(2, name.size() / 3);
  for (const Flag& flag : flags_) {
    if (const size_t distance = EditDistance(name, flag.name); distance <= least) {
      least = distance;
      nearest = &flag;
    }
  }
  if (nearest != nullptr) message += " (did you mean --" + nearest->name + "?)";
  return Error(Code::kInvalidArgument, std::move(message));
}

Status FlagSet::Assign(Flag& flag, std::string value, const std::string& source) {
  if (const Status status = flag.set(value); !status.ok()) {
    const std::string where = source == "flag" ? "" : " (from " + source + ")";
    return {status.code(), "--" + flag.name + "=" + value + where + " " + status.message()};
  }
  flag.value = std::move(value);
  flag.source = source;
  return Status::Ok();
}

Status FlagSet::ParseArgs(std::span<const std::string> args) {
  bool have_argument = false;
  bool have_flagfile = false;
  for (size_t i = 0; i < args.size(); ++i) {
    const std::string& arg = args[i];
    if (arg.size() < 2 || arg[0] != '-') {
      if (argument_ == nullptr || have_argument) {
        return Error(Code::kInvalidArgument, "stray argument '" + arg + "'");
      }
      *argument_ = arg;
      have_argument = true;
      continue;
    }
    const size_t equals = arg.find('=');
    const std::string as_written = arg.substr(0, equals);
    const std::string name = FlagName(as_written);
    std::optional<std::string> value;
    if (equals != std::string::npos) value = arg.substr(equals + 1);

    Flag* flag = Find(name);
    if (flag == nullptr && name.starts_with("no") && !value) {
      flag = Find(name.substr(2));
      if (flag != nullptr && !flag->is_switch) flag = nullptr;
      if (flag != nullptr) value = "false";
    }
    const bool is_flagfile = name == "flagfile";
    if (flag == nullptr && !is_flagfile) return UnknownFlag(as_written);
    if (!value && flag != nullptr && flag->is_switch) value = "true";
    if (!value) {
      if (i + 1 == args.size() || args[i + 1].starts_with("--")) {
        return Error(Code::kInvalidArgument, as_written + " needs a value");
      }
      value = args[++i];
    }
    if (is_flagfile ? have_flagfile : flag->source == "flag") {
      return Error(Code::kInvalidArgument, "--" + name + " is given twice (" +
                                               (is_flagfile ? flagfile_ : flag->value) + ", then " +
                                               *value + ")");
    }
    if (is_flagfile) {
      flagfile_ = *value;
      have_flagfile = true;
    } else {
      KVRELAY_RETURN_IF_ERROR(Assign(*flag, std::move(*value), "flag"));
    }
  }
  if (argument_ != nullptr && !have_argument) {
    return Error(Code::kInvalidArgument, argument_placeholder_ + " is missing");
  }
  return Status::Ok();
}

Status FlagSet::ParseFile(const std::string& path) {
  std::ifstream in(path, std::ios::binary | std::ios::ate);
  if (!in) return Error(Code::kInvalidArgument, "--flagfile=" + path + " cannot be read");
  if (in.tellg() < 0 || static_cast<uintmax_t>(in.tellg()) > kMaxFlagFileBytes) {
    return Error(Code::kInvalidArgument, "--flagfile=" + path + " is no file of at most 1 MiB");
  }
  in.seekg(0);
  std::vector<std::string> seen;
  std::string line;
  for (int number = 1; std::getline(in, line); ++number) {
    const std::string_view text = Trim(line);
    if (text.empty() || text[0] == '#') continue;
    const std::string source = "file " + path + ":" + std::to_string(number);
    if (text[0] != '-') {
      return Error(Code::kInvalidArgument,
                   source + ": needs --flag=value, not '" + std::string(text) + "'");
    }
    const size_t equals = text.find('=');
    const std::string as_written(text.substr(0, equals));
    Flag* flag = Find(FlagName(as_written));
    if (flag == nullptr) return UnknownFlag(as_written).Wrap(source);
    if (equals == std::string_view::npos && !flag->is_switch) {
      return Error(Code::kInvalidArgument, source + ": --" + flag->name + " needs =value");
    }
    if (std::find(seen.begin(), seen.end(), flag->name) != seen.end()) {
      return Error(Code::kInvalidArgument, source + ": --" + flag->name + " is given twice");
    }
    seen.push_back(flag->name);
    if (flag->source == "flag") continue;
    std::string value(equals == std::string_view::npos ? "true" : text.substr(equals + 1));
    KVRELAY_RETURN_IF_ERROR(Assign(*flag, std::move(value), source));
  }
  return Status::Ok();
}

Status FlagSet::ParseEnvironment(const Environment& environment) {
  for (Flag& flag : flags_) {
    if (flag.source != "default") continue;
    const std::string variable = EnvironmentName(flag.name);
    if (std::optional<std::string> value = environment(variable)) {
      KVRELAY_RETURN_IF_ERROR(Assign(flag, std::move(*value), "environment " + variable));
    }
  }
  return Status::Ok();
}

Result<Action> FlagSet::Parse(std::span<const std::string> args, const Environment& environment) {
  if (std::any_of(args.begin(), args.end(), IsHelp)) return Action::kHelp;
  if (std::any_of(args.begin(), args.end(), IsVersion)) return Action::kVersion;
  KVRELAY_RETURN_IF_ERROR(ParseArgs(args));
  if (flagfile_.empty()) flagfile_ = environment(EnvironmentName("flagfile")).value_or("");
  if (!flagfile_.empty()) KVRELAY_RETURN_IF_ERROR(ParseFile(flagfile_));
  KVRELAY_RETURN_IF_ERROR(ParseEnvironment(environment));
  return Action::kRun;
}

std::string FlagSet::Help() const {
  constexpr size_t kColumn = 34;
  std::string text = "Usage: " + usage_ + "\n\n" + about_ + "\n";
  if (argument_ != nullptr)
    text += "\n" + HelpEntry(argument_placeholder_, argument_help_, kColumn);
  for (size_t section = 0; section < sections_.size(); ++section) {
    std::string entries;
    for (const Flag& flag : flags_) {
      if (flag.section != section) continue;
      const std::string head = "--" + flag.name + (flag.is_switch ? "" : "=" + flag.placeholder);
      std::string help = flag.help;
      if (!flag.is_switch && !flag.value.empty()) help += " (default " + flag.value + ")";
      if (flag.is_switch && flag.value == "true") help += " (default on)";
      entries += HelpEntry(head, help, kColumn);
    }
    if (!entries.empty()) text += "\n" + sections_[section] + ":\n" + entries;
  }
  text += "\nAlso:\n";
  text += HelpEntry("--flagfile=FILE", "reads flags from a file, one --flag=value a line", kColumn);
  text += HelpEntry("KVRELAY_<FLAG>=VALUE",
                    "sets a flag from the environment; a flag comes before the file, the file "
                    "before the environment",
                    kColumn);
  text += HelpEntry("--help, --version", "", kColumn);
  text += "\nExample:\n  " + example_ + "\n";
  return text;
}

std::vector<EffectiveFlag> FlagSet::Effective() const {
  std::vector<EffectiveFlag> all;
  all.reserve(flags_.size());
  for (const Flag& flag : flags_) all.push_back({flag.name, flag.value, flag.source});
  return all;
}

bool AsksForJson(std::span<const std::string> args) {
  return std::any_of(args.begin(), args.end(), [](const std::string& arg) {
    return arg == "--json" || arg == "-json" || arg == "--json=true" || arg == "--json=1";
  });
}

}  // namespace kvrelay::tools
