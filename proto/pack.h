// Struct -> msgpack, by schema. Private to proto/.
#pragma once

#include <array>
#include <bit>
#include <cstdint>
#include <msgpack.hpp>
#include <string>
#include <string_view>
#include <tuple>
#include <type_traits>
#include <vector>

#include "proto/block_runs.h"
#include "proto/schema.h"

namespace kvrelay::proto {

struct StringSink {
  std::string bytes;
  void write(const char* data, size_t size) { bytes.append(data, size); }
};
using Packer = msgpack::packer<StringSink>;

inline void PackText(Packer& out, std::string_view text) {
  out.pack_str(static_cast<uint32_t>(text.size()));
  out.pack_str_body(text.data(), static_cast<uint32_t>(text.size()));
}
inline void PackBytes(Packer& out, const void* data, size_t size) {
  out.pack_bin(static_cast<uint32_t>(size));
  out.pack_bin_body(static_cast<const char*>(data), static_cast<uint32_t>(size));
}

template <typename T>
void PackStruct(Packer& out, const T& message);

// Enums travel by name: readable in a dump, and free to be renumbered.
inline void PackValue(Packer& out, Code code) { PackText(out, CodeName(code)); }
inline void PackValue(Packer& out, DType dtype) { PackText(out, DTypeName(dtype)); }
inline void PackValue(Packer& out, KvFormat format) { PackText(out, KvFormatName(format)); }
inline void PackValue(Packer& out, Priority priority) { PackText(out, PriorityName(priority)); }
template <typename Tag>
void PackValue(Packer& out, const Id128<Tag>& id) {
  PackBytes(out, id.bytes.data(), id.bytes.size());
}
template <typename T>
requires std::is_integral_v<T>
void PackValue(Packer& out, T value) { out.pack(value); }
// Always as a float of its size. Up to version 6 the library writes whole numbers as integers,
// version 7 does not; our bytes are the same everywhere.
template <typename T>
requires std::is_floating_point_v<T>
void PackValue(Packer& out, T value) {
  using Bits = std::conditional_t<sizeof(T) == 8, uint64_t, uint32_t>;
  const Bits bits = std::bit_cast<Bits>(value);
  std::array<char, 1 + sizeof(T)> bytes = {sizeof(T) == 8 ? '\xcb' : '\xca'};
  for (size_t i = 0; i < sizeof(T); ++i) {
    bytes[1 + i] = static_cast<char>(bits >> (8 * (sizeof(T) - 1 - i)));
  }
  out.pack_bin_body(bytes.data(), bytes.size());  // appends them as they are
}
template <typename T>
requires requires { Schema<T>::kFields; }
void PackValue(Packer& out, const T& message) { PackStruct(out, message); }

template <typename S, typename M>
void PackField(Packer& out, const S& message, const Field<S, M>& field) {
  PackText(out, field.name);
  PackValue(out, message.*field.member);
}
template <typename S>
void PackField(Packer& out, const S& message, const Field<S, std::string>& field) {
  const std::string& value = message.*field.member;
  PackText(out, field.name);
  if (field.opaque) {
    PackBytes(out, value.data(), value.size());
  } else {
    PackText(out, value);
  }
}
template <typename S, typename E>
void PackField(Packer& out, const S& message, const Field<S, std::vector<E>>& field) {
  const std::vector<E>& values = message.*field.member;
  PackText(out, field.name);
  out.pack_array(static_cast<uint32_t>(values.size()));
  for (const E& value : values) PackValue(out, value);
}

// Where tensors lie is regular: runs of [count, region, step of the region, offset, step of the
// offset]. Steps wrap, so that they can go back.
template <typename S>
void PackField(Packer& out, const S& message, const Field<S, std::vector<TensorPlace>>& field) {
  const std::vector<TensorPlace>& places = message.*field.member;
  struct Run {
    uint64_t count;
    TensorPlace first;
    TensorPlace step;
  };
  std::vector<Run> runs;
  for (size_t i = 0; i < places.size(); ++i) {
    const TensorPlace& place = places[i];
    if (!runs.empty()) {
      Run& run = runs.back();
      const TensorPlace step{place.region - places[i - 1].region,
                             place.offset - places[i - 1].offset};
      if (run.count == 1) run.step = step;
      if (run.step == step) {
        ++run.count;
        continue;
      }
    }
    runs.push_back({1, place, {}});
  }
  PackText(out, field.name);
  out.pack_array(static_cast<uint32_t>(runs.size()));
  for (const Run& run : runs) {
    out.pack_array(5);
    out.pack(run.count);
    out.pack(run.first.region);
    out.pack(run.step.region);
    out.pack(run.first.offset);
    out.pack(run.step.offset);
  }
}

// [first token, held from, blocks] of each.
template <typename S>
void PackField(Packer& out, const S& message, const Field<S, std::vector<KvTable>>& field) {
  const std::vector<KvTable>& tables = message.*field.member;
  PackText(out, field.name);
  out.pack_array(static_cast<uint32_t>(tables.size()));
  for (const KvTable& table : tables) {
    out.pack_array(3);
    out.pack(table.first_token);
    out.pack(table.held_from);
    const std::string blocks = PackBlocks(table.blocks);
    PackBytes(out, blocks.data(), blocks.size());
  }
}

template <typename T>
void PackStruct(Packer& out, const T& message) {
  out.pack_map(std::tuple_size_v<std::remove_const_t<decltype(Schema<T>::kFields)>>);
  std::apply([&](const auto&... field) { (PackField(out, message, field), ...); },
             Schema<T>::kFields);
}

}  // namespace kvrelay::proto
