// Errors as values. No exception crosses a folder boundary; libraries that throw are caught where
// they do.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <tl/expected.hpp>
#include <utility>

namespace kvrelay {

// What went wrong, as far as a caller has to decide differently. Names travel on the wire and in
// JSON ("kPeerUnreachable"); add at the end, never rename.
enum class Code : uint8_t {
  kOk = 0,
  kInternal,          // a defect or an unexpected failure of the system below us
  kInvalidArgument,   // the caller's fault: usage, bad flag, bad model, malformed message
  kNotFound,          // no such lease, request, region, model file
  kPeerUnreachable,   // no answer, or the connection broke (retryable)
  kDeadlineExceeded,  // our own bound on a wait was reached (retryable)
  kIncompatible,      // both sides answered, but cannot work together (versions, models, layouts)
  kRefused,           // the peer understood and said no (forged ticket, not allowed)
  kOverloaded,        // no room now (retryable)
  kDraining,          // the process is shutting down (retryable elsewhere)
  kTooLarge,          // can never fit
  kLeaseEnded,        // the owner's promise is over: expired, released, restarted (retryable)
  kStaleRead,         // the guard words disagree: the bytes were thrown away (retryable)
  kCancelled,
  kResourceExhausted,  // memory, descriptors, slots of this process
};

std::string_view CodeName(Code code);      // "kPeerUnreachable"
Code CodeFromName(std::string_view name);  // unknown names are kInternal
bool IsRetryable(Code code);               // trying again, perhaps elsewhere, can succeed

// A code and a message that a user can act on: which peer, which lease, both sides' values.
class [[nodiscard]] Status {
 public:
  Status() = default;
  Status(Code code, std::string message) : code_(code), message_(std::move(message)) {}
  static Status Ok() { return {}; }

  bool ok() const { return code_ == Code::kOk; }
  Code code() const { return code_; }
  const std::string& message() const { return message_; }
  // "kPeerUnreachable: prefill 10.0.0.7:7601 rank 1 did not answer GET_META in 2000 ms (3 tries)"
  std::string ToString() const;
  // The same failure seen from further out: "<context>: <message>".
  Status Wrap(std::string_view context) const;

 private:
  Code code_ = Code::kOk;
  std::string message_;
};

template <typename T>
using Result = tl::expected<T, Status>;

// return Error(Code::kRefused, "...") works in functions that return Status and in those that
// return Result<T>.
class [[nodiscard]] Error {
 public:
  Error(Code code, std::string message) : status_(code, std::move(message)) {}
  explicit Error(Status status) : status_(std::move(status)) {}
  operator Status() && { return std::move(status_); }  // NOLINT(google-explicit-constructor)
  template <typename T>
  operator tl::expected<T, Status>() && {  // NOLINT(google-explicit-constructor)
    return tl::unexpected<Status>(std::move(status_));
  }

 private:
  Status status_;
};

}  // namespace kvrelay

// Passes a failed Status on to the caller.
#define KVRELAY_RETURN_IF_ERROR(expression)                                        \
  do {                                                                             \
    if (::kvrelay::Status kvrelay_status_ = (expression); !kvrelay_status_.ok()) { \
      return ::kvrelay::Error(std::move(kvrelay_status_));                         \
    }                                                                              \
  } while (false)

#define KVRELAY_CONCAT_INNER_(a, b) a##b
#define KVRELAY_CONCAT_(a, b) KVRELAY_CONCAT_INNER_(a, b)
#define KVRELAY_ASSIGN_OR_RETURN_(tmp, target, expression)               \
  auto tmp = (expression);                                               \
  if (!tmp.has_value()) return ::kvrelay::Error(std::move(tmp).error()); \
  target = std::move(tmp).value()
// KVRELAY_ASSIGN_OR_RETURN(auto region, Region::AllocateHost(...));
#define KVRELAY_ASSIGN_OR_RETURN(target, expression) \
  KVRELAY_ASSIGN_OR_RETURN_(KVRELAY_CONCAT_(kvrelay_result_, __LINE__), target, expression)
