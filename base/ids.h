// Names of things, as strong types: 128-bit random or content-derived, and 64-bit incarnations.
#pragma once

#include <array>
#include <compare>
#include <cstdint>
#include <cstring>
#include <functional>
#include <string>

namespace kvrelay {

// 16 opaque bytes. `Tag` keeps a lease id from being passed as a prompt hash.
template <typename Tag>
struct Id128 {
  std::array<uint8_t, 16> bytes{};

  bool IsZero() const { return bytes == std::array<uint8_t, 16>{}; }
  auto operator<=>(const Id128&) const = default;
  // 32 lower-case hex digits.
  std::string ToHex() const {
    static constexpr char kDigits[] = "0123456789abcdef";
    std::string out;
    out.reserve(32);
    for (const uint8_t b : bytes) {
      out.push_back(kDigits[b >> 4]);
      out.push_back(kDigits[b & 15]);
    }
    return out;
  }
};

// Random; knowing it is the right to claim the lease.
using LeaseId = Id128<struct LeaseIdTag>;
// One engine: a daemon with all its ranks. Survives restarts if configured.
using EngineId = Id128<struct EngineIdTag>;
// BLAKE2b-128 of content (base/hash.h): prompt, prefix, model fingerprint.
using ContentHash = Id128<struct ContentHashTag>;

// Random per process start, never 0: tells a restarted process from the one before at its address.
using Incarnation = uint64_t;

}  // namespace kvrelay

template <typename Tag>
struct std::hash<kvrelay::Id128<Tag>> {
  size_t operator()(const kvrelay::Id128<Tag>& id) const noexcept {
    size_t h = 0;
    std::memcpy(&h, id.bytes.data(), sizeof(h));
    return h;
  }
};
