#include "proto/base64url.h"

#include <array>
#include <cstdint>

namespace kvrelay::proto {
namespace {

constexpr std::string_view kDigits =
    "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_";
constexpr uint8_t kNoDigit = 64;

constexpr std::array<uint8_t, 256> kValues = [] {
  std::array<uint8_t, 256> values{};
  values.fill(kNoDigit);
  uint8_t value = 0;
  for (const char digit : kDigits) values[static_cast<uint8_t>(digit)] = value++;
  return values;
}();

}  // namespace

std::string ToBase64Url(std::string_view bytes) {
  std::string text;
  text.reserve((bytes.size() * 4 + 2) / 3);
  uint32_t pending = 0;
  int bits = 0;
  for (const char c : bytes) {
    pending = (pending << 8 | static_cast<uint8_t>(c)) & 0xffff;
    for (bits += 8; bits >= 6; bits -= 6) text.push_back(kDigits[pending >> (bits - 6) & 63]);
  }
  if (bits > 0) text.push_back(kDigits[pending << (6 - bits) & 63]);
  return text;
}

std::optional<std::string> FromBase64Url(std::string_view text) {
  std::string bytes;
  bytes.reserve(text.size() * 3 / 4);
  uint32_t pending = 0;
  int bits = 0;
  for (const char c : text) {
    const uint8_t value = kValues[static_cast<uint8_t>(c)];
    if (value == kNoDigit) return std::nullopt;
    pending = (pending << 6 | value) & 0xfff;
    bits += 6;
    if (bits >= 8) {
      bits -= 8;
      bytes.push_back(static_cast<char>(pending >> bits & 0xff));
    }
  }
  // A whole digit over, or bits that no writer sets: not canonical.
  if (bits >= 6 || (pending & ((1U << bits) - 1)) != 0) return std::nullopt;
  return bytes;
}

}  // namespace kvrelay::proto
