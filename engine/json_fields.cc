#include "engine/json_fields.h"

#include <cmath>
#include <limits>
#include <utility>

namespace kvrelay::engine {
namespace {

using nlohmann::json;

// The value as a message shows it: short, and always valid text.
std::string Show(const json& value) {
  constexpr size_t kMaxShown = 80;
  std::string text = value.dump(-1, ' ', true, json::error_handler_t::replace);
  if (text.size() > kMaxShown) text = text.substr(0, kMaxShown) + "...";
  return text;
}

std::optional<uint64_t> AsUint(const json& value) {
  if (value.is_number_unsigned()) return value.get<uint64_t>();
  if (value.is_number_float()) {
    const double number = value.get<double>();
    if (number >= 0 && number <= 9007199254740992.0 && number == std::floor(number)) {
      return static_cast<uint64_t>(number);
    }
  }
  return std::nullopt;
}

}  // namespace

Result<JsonFields> JsonFields::Parse(const std::string& text, std::string where) {
  // Copying and printing nested values recurses: what is nested deeper than any real file is
  // dropped while parsing.
  bool too_deep = false;
  const json::parser_callback_t shallow = [&](int depth, json::parse_event_t, json&) {
    constexpr int kMaxDepth = 32;
    too_deep = too_deep || depth > kMaxDepth;
    return depth <= kMaxDepth;
  };
  json object = json::parse(text, shallow, /*allow_exceptions=*/false);
  if (too_deep) return Error(Code::kInvalidArgument, where + " is nested too deeply");
  if (object.is_discarded()) return Error(Code::kInvalidArgument, where + " is not valid JSON");
  if (!object.is_object()) return Error(Code::kInvalidArgument, where + " is not a JSON object");
  return JsonFields(std::move(object), std::move(where));
}

bool JsonFields::Has(const char* field) const {
  const auto it = object_.find(field);
  return it != object_.end() && !it->is_null();
}

Status JsonFields::Refuse(const std::string& field, const std::string& why) const {
  const auto it = object_.find(field);
  const std::string value = it == object_.end() ? "(absent)" : Show(*it);
  return {Code::kInvalidArgument, where_ + ": " + field + " = " + value + " " + why};
}

Result<uint64_t> JsonFields::Uint(const char* field, uint64_t min, uint64_t max) const {
  if (!Has(field)) return Error(Refuse(field, "is required"));
  const std::optional<uint64_t> value = AsUint(object_[field]);
  if (!value || *value < min || *value > max) {
    return Error(Refuse(
        field, "is not a whole number from " + std::to_string(min) + " to " + std::to_string(max)));
  }
  return *value;
}

Result<uint64_t> JsonFields::UintOr(const char* field, uint64_t min, uint64_t max,
                                    uint64_t absent) const {
  if (!Has(field)) return absent;
  return Uint(field, min, max);
}

Result<double> JsonFields::Positive(const char* field) const {
  if (!Has(field)) return Error(Refuse(field, "is required"));
  const json& value = object_[field];
  if (!value.is_number() || !std::isfinite(value.get<double>()) || value.get<double>() <= 0) {
    return Error(Refuse(field, "is not a number above 0"));
  }
  return value.get<double>();
}

Result<double> JsonFields::PositiveOr(const char* field, double absent) const {
  if (!Has(field)) return absent;
  return Positive(field);
}

Result<bool> JsonFields::BoolOr(const char* field, bool absent) const {
  if (!Has(field)) return absent;
  const json& value = object_[field];
  if (!value.is_boolean()) return Error(Refuse(field, "is neither true nor false"));
  return value.get<bool>();
}

Result<std::string> JsonFields::StringOr(const char* field, const std::string& absent) const {
  if (!Has(field)) return absent;
  const json& value = object_[field];
  if (!value.is_string()) return Error(Refuse(field, "is not a string"));
  return value.get<std::string>();
}

Result<std::vector<uint32_t>> JsonFields::Ids(const char* field) const {
  std::vector<uint32_t> ids;
  if (!Has(field)) return ids;
  const json& value = object_[field];
  const json list = value.is_array() ? value : json::array({value});
  for (const json& entry : list) {
    const std::optional<uint64_t> id = AsUint(entry);
    if (!id || *id > std::numeric_limits<uint32_t>::max()) {
      return Error(Refuse(field, "is neither a token id nor a list of them"));
    }
    ids.push_back(static_cast<uint32_t>(*id));
  }
  return ids;
}

Result<std::optional<JsonFields>> JsonFields::Object(const char* field) const {
  if (!Has(field)) return std::optional<JsonFields>();
  const json& value = object_[field];
  if (!value.is_object()) return Error(Refuse(field, "is not an object"));
  return std::optional<JsonFields>(JsonFields(value, where_ + ": " + field));
}

}  // namespace kvrelay::engine
