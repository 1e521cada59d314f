// Fills any message with values from a seeded generator, by its schema: small and edge values,
// within the limits.
#pragma once

#include <algorithm>
#include <cstdlib>
#include <random>
#include <string>
#include <tuple>
#include <type_traits>
#include <vector>

#include "proto/schema.h"

namespace kvrelay::proto {

using Random = std::mt19937_64;  // its numbers are the same everywhere; distributions' are not

// From KVRELAY_SEED, else new. Print it with SCOPED_TRACE.
inline uint64_t TestSeed() {
  const char* const given = std::getenv("KVRELAY_SEED");
  return given != nullptr ? std::strtoull(given, nullptr, 10) : std::random_device{}();
}

inline uint64_t RandomNumber(Random& random, uint64_t max) {
  constexpr uint64_t kEdges[] = {0, 1, 127, 128, 255, 256, 65535, 65536, UINT32_MAX, UINT64_MAX};
  const uint64_t wish =
      random() % 3 == 0 ? kEdges[random() % std::size(kEdges)] : random() >> (random() % 64);
  return std::min(wish, max);
}

template <typename T>
void Fill(Random& random, T& value);

template <typename M>
void FillValue(Random& random, M& value, uint64_t max) {
  if constexpr (std::is_same_v<M, bool>) {
    value = random() % 2 == 0;
  } else if constexpr (std::is_same_v<M, double>) {
    value = static_cast<double>(static_cast<int64_t>(random())) / 1024;
  } else if constexpr (std::is_same_v<M, float>) {
    value = static_cast<float>(static_cast<int32_t>(random())) / 1024;
  } else if constexpr (std::is_same_v<M, TensorPlace>) {
    value.region = static_cast<uint32_t>(random() % 3);
    value.offset = RandomNumber(random, UINT64_MAX);
  } else if constexpr (std::is_same_v<M, KvTable>) {
    value.first_token = static_cast<uint32_t>(RandomNumber(random, kMaxTokens));
    value.held_from = static_cast<uint32_t>(RandomNumber(random, kMaxTokens));
    while (random() % 4 != 0) {
      const auto first = static_cast<uint32_t>(RandomNumber(random, UINT32_MAX - 8));
      for (uint64_t i = random() % 8; i > 0; --i) {
        value.blocks.push_back(first + 8 - static_cast<uint32_t>(i));
      }
    }
  } else if constexpr (std::is_unsigned_v<M>) {
    value = static_cast<M>(
        RandomNumber(random, std::min<uint64_t>(max, std::numeric_limits<M>::max())));
  } else if constexpr (std::is_same_v<M, Code>) {
    value = static_cast<Code>(1 + random() % static_cast<uint64_t>(Code::kResourceExhausted));
  } else if constexpr (std::is_same_v<M, DType> || std::is_same_v<M, KvFormat>) {
    value = static_cast<M>(random() % 3);
  } else if constexpr (std::is_same_v<M, Priority>) {
    value = static_cast<M>(random() % 2);
  } else if constexpr (requires { value.bytes.front(); }) {
    for (auto& byte : value.bytes) byte = static_cast<uint8_t>(random());
  } else {
    Fill(random, value);
  }
}

template <typename S, typename M>
void FillField(Random& random, S& message, const Field<S, M>& field) {
  FillValue(random, message.*field.member, field.max);
}
template <typename S>
void FillField(Random& random, S& message, const Field<S, std::string>& field) {
  std::string& text = message.*field.member;
  text.resize(std::clamp<uint64_t>(RandomNumber(random, 40), field.min, field.max));
  for (char& c : text) c = static_cast<char>(random());
}
template <typename S, typename E>
void FillField(Random& random, S& message, const Field<S, std::vector<E>>& field) {
  auto& values = message.*field.member;
  values.resize(std::min<uint64_t>(random() % 5, field.max));
  for (E& value : values) FillValue(random, value, UINT64_MAX);
}

template <typename T>
void Fill(Random& random, T& value) {
  std::apply([&](const auto&... field) { (FillField(random, value, field), ...); },
             Schema<T>::kFields);
}

template <typename T>
T RandomMessage(Random& random) {
  T message;
  Fill(random, message);
  return message;
}

}  // namespace kvrelay::proto
