#include "proto/messages.h"

#include <array>

namespace kvrelay::proto {
namespace {

// By value of Type. The names travel on the wire.
constexpr std::array<std::string_view, 20> kTypeNames = {
    "ERROR",   "OK",        "GET_META",    "HELLO",         "START",  "END",        "CLAIM",
    "RELEASE", "HEARTBEAT", "PACKED_READ", "PACKED_CANCEL", "PULL",   "DROP",       "DESCRIBE",
    "PING",    "HEALTH",    "PREFILL",     "GENERATE",      "CANCEL", "CANCEL_CALL"};
static_assert(kTypeNames.size() == static_cast<size_t>(Type::kCancelCall) + 1);

}  // namespace

std::string_view TypeName(Type type) {
  const auto index = static_cast<size_t>(type);
  return index < kTypeNames.size() ? kTypeNames[index] : "UNKNOWN";
}

std::optional<Type> TypeFromName(std::string_view name) {
  for (size_t i = 0; i < kTypeNames.size(); ++i) {
    if (kTypeNames[i] == name) return static_cast<Type>(i);
  }
  return std::nullopt;
}

}  // namespace kvrelay::proto
