// Reads the fields of one JSON object; every refusal names the file, the field and the value that
// stands there. A field that is null counts as absent.
#pragma once

#include <cstdint>
#include <nlohmann/json.hpp>
#include <optional>
#include <string>
#include <vector>

#include "base/status.h"

namespace kvrelay::engine {

class JsonFields {
 public:
  // `where` names the object in messages ("models/x/config.json"). kInvalidArgument when `text` is
  // not one JSON object.
  static Result<JsonFields> Parse(const std::string& text, std::string where);
  JsonFields(nlohmann::json object, std::string where)
      : object_(std::move(object)), where_(std::move(where)) {}

  bool Has(const char* field) const;
  // Whole numbers in [min, max]; 5.0 is one too.
  Result<uint64_t> Uint(const char* field, uint64_t min, uint64_t max) const;
  Result<uint64_t> UintOr(const char* field, uint64_t min, uint64_t max, uint64_t absent) const;
  // Finite numbers > 0.
  Result<double> Positive(const char* field) const;
  Result<double> PositiveOr(const char* field, double absent) const;
  Result<bool> BoolOr(const char* field, bool absent) const;
  Result<std::string> StringOr(const char* field, const std::string& absent) const;
  // One number or a list of them; empty when absent.
  Result<std::vector<uint32_t>> Ids(const char* field) const;
  // An object inside this one; nothing when absent.
  Result<std::optional<JsonFields>> Object(const char* field) const;

  // kInvalidArgument: "<where>: <field> = <value> <why>".
  Status Refuse(const std::string& field, const std::string& why) const;
  const nlohmann::json& object() const { return object_; }

 private:
  nlohmann::json object_;
  std::string where_;
};

}  // namespace kvrelay::engine
