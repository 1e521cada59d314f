#include "base/status.h"

#include <array>

namespace kvrelay {
namespace {

constexpr std::array<std::string_view, 15> kNames = {
    "kOk",           "kInternal",        "kInvalidArgument",
    "kNotFound",     "kPeerUnreachable", "kDeadlineExceeded",
    "kIncompatible", "kRefused",         "kOverloaded",
    "kDraining",     "kTooLarge",        "kLeaseEnded",
    "kStaleRead",    "kCancelled",       "kResourceExhausted"};

}  // namespace

std::string_view CodeName(Code code) {
  const auto index = static_cast<size_t>(code);
  return index < kNames.size() ? kNames[index] : "kInternal";
}

Code CodeFromName(std::string_view name) {
  for (size_t i = 0; i < kNames.size(); ++i) {
    if (kNames[i] == name) return static_cast<Code>(i);
  }
  return Code::kInternal;
}

bool IsRetryable(Code code) {
  switch (code) {
    case Code::kPeerUnreachable:
    case Code::kDeadlineExceeded:
    case Code::kOverloaded:
    case Code::kDraining:
    case Code::kLeaseEnded:
    case Code::kStaleRead:
      return true;
    default:
      return false;
  }
}

std::string Status::ToString() const {
  if (ok()) return "kOk";
  return std::string(CodeName(code_)) + ": " + message_;
}

Status Status::Wrap(std::string_view context) const {
  if (ok()) return *this;
  return {code_, std::string(context) + ": " + message_};
}

}  // namespace kvrelay
