// msgpack object tree -> struct, by schema. Private to proto/.
//
// Failures are built from the inside out: a value says what is wrong, and each level in front of it
// adds its piece of the path
// ("shard" -> "ranks[3].shard" -> "CLAIM_REPLY: field 'ranks[3].shard' is missing").
#pragma once

#include <algorithm>
#include <cmath>
#include <cstring>
#include <msgpack.hpp>
#include <optional>
#include <string>
#include <string_view>
#include <tuple>
#include <type_traits>
#include <vector>

#include "proto/block_runs.h"
#include "proto/schema.h"

namespace kvrelay::proto {

struct Failure {
  std::string path;  // "ranks[3].shard"
  std::string what;  // "is missing"

  static Failure Here(std::string what) { return {{}, std::move(what)}; }
  Failure Under(std::string_view name) && {
    const bool dot = !path.empty() && path.front() != '[';
    path = std::string(name) + (dot ? "." : "") + path;
    return std::move(*this);
  }
};
// Nothing when all went well.
using Check = std::optional<Failure>;

inline std::string_view View(const msgpack::object& text) {
  return {text.via.str.ptr, text.via.str.size};
}

template <typename T>
Check UnpackStruct(const msgpack::object& from, T& to);

// `max` is the schema's limit for numbers.
template <typename T>
requires std::is_unsigned_v<T> Check UnpackValue(const msgpack::object& from, T& to, uint64_t max) {
  if (from.type != msgpack::type::POSITIVE_INTEGER) {
    return Failure::Here("is not a number >= 0");
  }
  const uint64_t largest = std::min<uint64_t>(max, std::numeric_limits<T>::max());
  if (from.via.u64 > largest) {
    return Failure::Here("is " + std::to_string(from.via.u64) + ", more than " +
                         std::to_string(largest));
  }
  to = static_cast<T>(from.via.u64);
  return {};
}
inline Check UnpackValue(const msgpack::object& from, bool& to, uint64_t) {
  if (from.type != msgpack::type::BOOLEAN) return Failure::Here("is not a boolean");
  to = from.via.boolean;
  return {};
}
// Also from integers: writers in other languages send 1.0 as 1.
inline Check UnpackValue(const msgpack::object& from, double& to, uint64_t) {
  switch (from.type) {
    case msgpack::type::FLOAT32:
    case msgpack::type::FLOAT64:
      to = from.via.f64;
      break;
    case msgpack::type::POSITIVE_INTEGER:
      to = static_cast<double>(from.via.u64);
      break;
    case msgpack::type::NEGATIVE_INTEGER:
      to = static_cast<double>(from.via.i64);
      break;
    default:
      return Failure::Here("is not a number");
  }
  if (!std::isfinite(to)) return Failure::Here("is not finite");
  return {};
}
inline Check UnpackValue(const msgpack::object& from, float& to, uint64_t max) {
  double value = 0;
  if (Check bad = UnpackValue(from, value, max)) return bad;
  if (std::abs(value) > std::numeric_limits<float>::max()) return Failure::Here("is no float");
  to = static_cast<float>(value);
  return {};
}
template <typename Tag>
Check UnpackValue(const msgpack::object& from, Id128<Tag>& to, uint64_t) {
  if (from.type != msgpack::type::BIN || from.via.bin.size != to.bytes.size()) {
    return Failure::Here("is not 16 bytes of binary");
  }
  std::memcpy(to.bytes.data(), from.via.bin.ptr, to.bytes.size());
  return {};
}
// Unknown codes become kInternal: a newer peer's error is still an error, and its text says the
// rest.
inline Check UnpackValue(const msgpack::object& from, Code& to, uint64_t) {
  if (from.type != msgpack::type::STR) return Failure::Here("is not a string");
  to = CodeFromName(View(from));
  if (to == Code::kOk) return Failure::Here("is kOk, which is no error");
  return {};
}
template <typename E>
Check UnpackEnum(const msgpack::object& from, E& to, Result<E> (*from_name)(std::string_view)) {
  constexpr size_t kLongestName = 32;
  if (from.type != msgpack::type::STR) return Failure::Here("is not a string");
  if (from.via.str.size > kLongestName) return Failure::Here("has an unknown value");
  const Result<E> value = from_name(View(from));
  if (!value) return Failure::Here("has the unknown value '" + std::string(View(from)) + "'");
  to = *value;
  return {};
}
inline Check UnpackValue(const msgpack::object& from, DType& to, uint64_t) {
  return UnpackEnum(from, to, &DTypeFromName);
}
inline Check UnpackValue(const msgpack::object& from, KvFormat& to, uint64_t) {
  return UnpackEnum(from, to, &KvFormatFromName);
}
inline Check UnpackValue(const msgpack::object& from, Priority& to, uint64_t) {
  return UnpackEnum(from, to, &PriorityFromName);
}
template <typename T>
requires requires { Schema<T>::kFields; }
Check UnpackValue(const msgpack::object& from, T& to, uint64_t) { return UnpackStruct(from, to); }

template <typename S, typename M>
Check UnpackField(const msgpack::object& from, S& to, const Field<S, M>& field) {
  return UnpackValue(from, to.*field.member, field.max);
}
template <typename S>
Check UnpackField(const msgpack::object& from, S& to, const Field<S, std::string>& field) {
  if (from.type != (field.opaque ? msgpack::type::BIN : msgpack::type::STR)) {
    return Failure::Here(field.opaque ? "is not binary" : "is not a string");
  }
  const std::string_view value =
      field.opaque ? std::string_view(from.via.bin.ptr, from.via.bin.size) : View(from);
  if (value.size() > field.max || value.size() < field.min) {
    return Failure::Here("has " + std::to_string(value.size()) + " bytes, not " +
                         std::to_string(field.min) + " to " + std::to_string(field.max));
  }
  to.*field.member = value;
  return {};
}
template <typename S, typename E>
Check UnpackField(const msgpack::object& from, S& to, const Field<S, std::vector<E>>& field) {
  if (from.type != msgpack::type::ARRAY) return Failure::Here("is not an array");
  const uint32_t size = from.via.array.size;
  if (size > field.max) {
    return Failure::Here("has " + std::to_string(size) + " elements, more than " +
                         std::to_string(field.max));
  }
  std::vector<E>& values = to.*field.member;
  values.resize(size);
  for (uint32_t i = 0; i < size; ++i) {
    if (Check bad = UnpackValue(from.via.array.ptr[i], values[i], UINT64_MAX)) {
      return std::move(*bad).Under("[" + std::to_string(i) + "]");
    }
  }
  return {};
}

// Runs of places, see pack.h.
template <typename S>
Check UnpackField(const msgpack::object& from, S& to,
                  const Field<S, std::vector<TensorPlace>>& field) {
  if (from.type != msgpack::type::ARRAY) return Failure::Here("is not an array");
  std::vector<TensorPlace>& places = to.*field.member;
  places.clear();
  for (uint32_t i = 0; i < from.via.array.size; ++i) {
    const msgpack::object& run = from.via.array.ptr[i];
    const std::string index = "[" + std::to_string(i) + "]";
    if (run.type != msgpack::type::ARRAY || run.via.array.size != 5) {
      return Failure::Here("is not an array of 5 numbers").Under(index);
    }
    const msgpack::object* const values = run.via.array.ptr;
    uint64_t count = 0;
    TensorPlace place;
    TensorPlace step;
    Check bad = UnpackValue(values[0], count, field.max - places.size());
    if (!bad) bad = UnpackValue(values[1], place.region, UINT32_MAX);
    if (!bad) bad = UnpackValue(values[2], step.region, UINT32_MAX);
    if (!bad) bad = UnpackValue(values[3], place.offset, UINT64_MAX);
    if (!bad) bad = UnpackValue(values[4], step.offset, UINT64_MAX);
    if (bad) return std::move(*bad).Under(index);
    for (; count > 0; --count) {
      places.push_back(place);
      place.region += step.region;
      place.offset += step.offset;
    }
  }
  return {};
}

// Block tables, see pack.h.
template <typename S>
Check UnpackField(const msgpack::object& from, S& to, const Field<S, std::vector<KvTable>>& field) {
  if (from.type != msgpack::type::ARRAY) return Failure::Here("is not an array");
  if (from.via.array.size > kMaxKinds) {
    return Failure::Here("has " + std::to_string(from.via.array.size) + " tables, more than " +
                         std::to_string(kMaxKinds));
  }
  std::vector<KvTable>& tables = to.*field.member;
  tables.clear();
  uint64_t left = field.max;
  for (uint32_t i = 0; i < from.via.array.size; ++i) {
    const msgpack::object& table = from.via.array.ptr[i];
    const std::string index = "[" + std::to_string(i) + "]";
    if (table.type != msgpack::type::ARRAY || table.via.array.size != 3 ||
        table.via.array.ptr[2].type != msgpack::type::BIN) {
      return Failure::Here("is not an array of 2 numbers and blocks").Under(index);
    }
    const msgpack::object* const values = table.via.array.ptr;
    KvTable& to_table = tables.emplace_back();
    Check bad = UnpackValue(values[0], to_table.first_token, kMaxTokens);
    if (!bad) bad = UnpackValue(values[1], to_table.held_from, kMaxTokens);
    if (bad) return std::move(*bad).Under(index);
    auto blocks = UnpackBlocks({values[2].via.bin.ptr, values[2].via.bin.size}, left);
    if (!blocks.has_value()) return Failure::Here(blocks.error().message()).Under(index);
    left -= blocks->size();
    to_table.blocks = std::move(*blocks);
  }
  return {};
}

// The value of `name`; null when there is none.
inline Check FindKey(const msgpack::object& map, std::string_view name,
                     const msgpack::object*& value) {
  value = nullptr;
  for (uint32_t i = 0; i < map.via.map.size; ++i) {
    const msgpack::object_kv& pair = map.via.map.ptr[i];
    if (pair.key.type != msgpack::type::STR || View(pair.key) != name) continue;
    if (value != nullptr) return Failure::Here("is there twice");
    value = &pair.val;
  }
  if (value == nullptr) return Failure::Here("is missing");
  return {};
}

template <typename T>
Check UnpackStruct(const msgpack::object& from, T& to) {
  if (from.type != msgpack::type::MAP) return Failure::Here("is not a map");
  Check bad;
  const auto one = [&](const auto& field) {
    const msgpack::object* value = nullptr;
    bad = FindKey(from, field.name, value);
    if (!bad) bad = UnpackField(*value, to, field);
    if (bad) bad = std::move(*bad).Under(field.name);
    return !bad.has_value();
  };
  std::apply([&](const auto&... field) { (void)(one(field) && ...); }, Schema<T>::kFields);
  return bad;
}

}  // namespace kvrelay::proto
