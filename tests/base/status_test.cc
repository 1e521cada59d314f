#include "base/status.h"

#include <gtest/gtest.h>

#include <memory>
#include <string>

namespace kvrelay {
namespace {

Status FailWith(Code code) { return Error(code, "why"); }
Result<int> Half(int n) {
  if (n % 2 != 0) return Error(Code::kInvalidArgument, std::to_string(n) + " is odd");
  return n / 2;
}
Result<int> Quarter(int n) {
  KVRELAY_ASSIGN_OR_RETURN(const int half, Half(n));
  KVRELAY_ASSIGN_OR_RETURN(const int quarter, Half(half));
  return quarter;
}
Status Check(int n) {
  KVRELAY_RETURN_IF_ERROR(FailWith(Code::kOk));
  KVRELAY_ASSIGN_OR_RETURN([[maybe_unused]] const int quarter, Quarter(n));
  return Status::Ok();
}

TEST(Status, NamesAreThoseOfTheWireAndComeBack) {
  EXPECT_EQ(CodeName(Code::kPeerUnreachable), "kPeerUnreachable");
  for (int i = 0; i <= static_cast<int>(Code::kResourceExhausted); ++i) {
    const auto code = static_cast<Code>(i);
    EXPECT_EQ(CodeFromName(CodeName(code)), code) << i;
  }
}

TEST(Status, UnknownCodesAndNamesAreInternal) {
  EXPECT_EQ(CodeName(static_cast<Code>(200)), "kInternal");
  EXPECT_EQ(CodeFromName("kFromTheFuture"), Code::kInternal);
}

TEST(Status, TextHasCodeAndMessage) {
  EXPECT_EQ(Status().ToString(), "kOk");
  EXPECT_EQ(Status(Code::kRefused, "no").ToString(), "kRefused: no");
}

TEST(Status, WrapAddsContextInFrontAndKeepsTheCode) {
  const Status wrapped = Status(Code::kNotFound, "no such lease").Wrap("prefill rank 1");
  EXPECT_EQ(wrapped.code(), Code::kNotFound);
  EXPECT_EQ(wrapped.message(), "prefill rank 1: no such lease");
  EXPECT_TRUE(Status::Ok().Wrap("anything").ok());
}

TEST(Status, OnlyFailuresThatMayPassAreRetryable) {
  EXPECT_TRUE(IsRetryable(Code::kPeerUnreachable));
  EXPECT_TRUE(IsRetryable(Code::kOverloaded));
  EXPECT_TRUE(IsRetryable(Code::kStaleRead));
  EXPECT_FALSE(IsRetryable(Code::kTooLarge));
  EXPECT_FALSE(IsRetryable(Code::kRefused));
  EXPECT_FALSE(IsRetryable(Code::kOk));
}

TEST(Result, MacrosPassTheFirstFailureOn) {
  EXPECT_EQ(Quarter(12).value(), 3);
  EXPECT_EQ(Quarter(6).error().message(), "3 is odd");
  EXPECT_TRUE(Check(8).ok());
  EXPECT_EQ(Check(7).message(), "7 is odd");
}

TEST(Result, CarriesMoveOnlyValues) {
  const auto make = []() -> Result<std::unique_ptr<int>> { return std::make_unique<int>(7); };
  const auto take = [&]() -> Result<int> {
    KVRELAY_ASSIGN_OR_RETURN(auto value, make());
    return *value;
  };
  EXPECT_EQ(take().value(), 7);
}

}  // namespace
}  // namespace kvrelay
