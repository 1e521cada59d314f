// Exit codes, failures as text and JSON, units, tables, endpoints.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <nlohmann/json.hpp>

#include "tools/common/endpoint.h"
#include "tools/common/exit_code.h"
#include "tools/common/output.h"
#include "tools/common/table.h"
#include "tools/common/units.h"
#include "tools/common/version.h"

namespace kvrelay::tools {
namespace {

using ::testing::HasSubstr;

TEST(ExitCodes, SayWhatAScriptHasToDo) {
  const std::vector<std::pair<Code, int>> expected = {
      {Code::kOk, 0},           {Code::kInternal, 1},        {Code::kInvalidArgument, 2},
      {Code::kNotFound, 1},     {Code::kPeerUnreachable, 3}, {Code::kDeadlineExceeded, 3},
      {Code::kIncompatible, 4}, {Code::kRefused, 4},         {Code::kOverloaded, 5},
      {Code::kDraining, 5},     {Code::kTooLarge, 2},        {Code::kLeaseEnded, 1},
      {Code::kStaleRead, 1},    {Code::kCancelled, 130},     {Code::kResourceExhausted, 1}};
  for (const auto& [code, exit_code] : expected) {
    EXPECT_EQ(ExitCodeOf(code), exit_code) << CodeName(code);
  }
}

TEST(ExitCodes, WhatIsReadBeforeTheStartIsConfiguration) {
  for (const Code code : {Code::kInvalidArgument, Code::kNotFound, Code::kResourceExhausted,
                          Code::kTooLarge, Code::kIncompatible}) {
    EXPECT_EQ(SetupExitCodeOf(code), 2) << CodeName(code);
  }
  EXPECT_EQ(SetupExitCodeOf(Code::kInternal), 1);
}

TEST(ErrorJsonTest, IsOneObjectWithASchema) {
  const auto json = nlohmann::json::parse(
      ErrorJson({Code::kPeerUnreachable, "no answer in 2000 ms"}, "tcp://127.0.0.1:9"));
  EXPECT_EQ(json["schema"], 1);
  EXPECT_EQ(json["error"]["code"], "kPeerUnreachable");
  EXPECT_EQ(json["error"]["message"], "no answer in 2000 ms");
  EXPECT_EQ(json["error"]["peer"], "tcp://127.0.0.1:9");
  EXPECT_EQ(json["error"]["retryable"], true);
}

TEST(ErrorJsonTest, SurvivesBytesThatAreNoText) {
  const auto json = nlohmann::json::parse(ErrorJson({Code::kRefused, "bad \xff byte"}, ""));
  EXPECT_EQ(json["error"]["retryable"], false);
  EXPECT_THAT(json["error"]["message"].get<std::string>(), HasSubstr("bad "));
}

TEST(Units, BytesForPeople) {
  EXPECT_EQ(FormatBytes(0), "0 B");
  EXPECT_EQ(FormatBytes(1023), "1023 B");
  EXPECT_EQ(FormatBytes(1024), "1 KiB");
  EXPECT_EQ(FormatBytes(1536), "1.5 KiB");
  EXPECT_EQ(FormatBytes(64ULL << 20), "64 MiB");
  EXPECT_EQ(FormatBytes(3ULL << 40), "3 TiB");
}

TEST(Units, TimesForPeople) {
  EXPECT_EQ(FormatMillis(0.085), "85 us");
  EXPECT_EQ(FormatMillis(1.236), "1.24 ms");
  EXPECT_EQ(FormatMillis(3200), "3.2 s");
  EXPECT_EQ(FormatMillis(250'000), "4 min 10 s");
  EXPECT_EQ(FormatMillis(7'500'000), "2 h 5 min");
  EXPECT_EQ(FormatCount(7), "7");
  EXPECT_EQ(FormatCount(1234567), "1,234,567");
}

TEST(Units, ByteSizesAreReadWithTheirUnit) {
  EXPECT_EQ(ParseBytes("512MiB").value(), 512ULL << 20);
  EXPECT_EQ(ParseBytes("1.5GiB").value(), 3ULL << 29);
  EXPECT_EQ(ParseBytes("2GB").value(), 2'000'000'000U);
  EXPECT_EQ(ParseBytes("17").value(), 17U);
  for (const char* bad : {"", "MiB", "-1MiB", "1 MiB", "1mib", "1e30GiB", "nan", "9999TB"}) {
    EXPECT_FALSE(ParseBytes(bad)) << bad;
  }
}

TEST(Units, ABareNumberIsBlocksAndOneWithAUnitIsBytes) {
  EXPECT_EQ(ParseBlockBudget("1024").value().blocks, 1024U);
  EXPECT_EQ(ParseBlockBudget("64MiB").value().bytes, 64ULL << 20);
  EXPECT_EQ(ParseBlockBudget("64MiB").value().blocks, 0U);
  for (const char* bad : {"0", "0MiB", "many", "", "-5", "4294967296"}) {
    EXPECT_FALSE(ParseBlockBudget(bad)) << bad;
  }
}

TEST(TableTest, AlignsColumnsByTheirContent) {
  Table table({"path", ">bytes", "why"});
  table.Row({"mapped", "5", "same host"});
  table.Row({"ucx-packed", "1,024", "größer"});
  EXPECT_EQ(table.Text("  "),
            "  path        bytes  why\n"
            "  mapped          5  same host\n"
            "  ucx-packed  1,024  größer\n");
}

TEST(Endpoints, AreReadWithAndWithoutTheScheme) {
  EXPECT_EQ(ParseEndpoint("tcp://127.0.0.1:7601", AnyPort::kForbidden).value().ToString(),
            "tcp://127.0.0.1:7601");
  EXPECT_EQ(ParseEndpoint("node7:7601", AnyPort::kForbidden).value().ToString(),
            "tcp://node7:7601");
  EXPECT_EQ(ParseEndpoint("tcp://[::1]:0", AnyPort::kAllowed).value().ToString(), "tcp://[::1]:0");
}

TEST(Endpoints, MayNameAKey) {
  const std::string key = transport::KeyToText(transport::NewCurveIdentity().public_key);
  const auto endpoint = ParseEndpoint("[::1]:7601#" + key, AnyPort::kForbidden);
  ASSERT_TRUE(endpoint) << endpoint.error().ToString();
  EXPECT_EQ(endpoint->host, "::1");
  EXPECT_EQ(endpoint->ToString(), "tcp://[::1]:7601#" + key);
  EXPECT_EQ(ParseEndpoint("tcp://a:1", AnyPort::kForbidden)->key, std::nullopt);
  for (const std::string bad : {"tcp://a:1#", "tcp://a:1#short", "tcp://a:1##"}) {
    EXPECT_THAT(ParseEndpoint(bad, AnyPort::kForbidden).error().message(),
                HasSubstr("is not a public key"));
  }
}

TEST(Endpoints, BadOnesAreQuoted) {
  for (const char* bad : {"", "tcp://", "127.0.0.1", "tcp://127.0.0.1", "tcp://:7", "udp://a:1",
                          "tcp://a:65536", "tcp://a:x", "tcp://a:0", "tcp://::1:7", "a b:1"}) {
    const auto endpoint = ParseEndpoint(bad, AnyPort::kForbidden);
    ASSERT_FALSE(endpoint) << bad;
    EXPECT_EQ(endpoint.error().message(),
              "'" + std::string(bad) + "' is no endpoint: write tcp://HOST:PORT");
  }
}

TEST(Endpoints, KnowLoopbackAndWildcard) {
  const auto at = [](const char* text) { return ParseEndpoint(text, AnyPort::kAllowed).value(); };
  EXPECT_TRUE(at("127.0.0.2:1").IsLoopback());
  EXPECT_TRUE(at("localhost:1").IsLoopback());
  EXPECT_TRUE(at("[::1]:1").IsLoopback());
  EXPECT_FALSE(at("10.0.0.1:1").IsLoopback());
  EXPECT_TRUE(at("0.0.0.0:1").IsWildcard());
  EXPECT_TRUE(at("*:1").IsWildcard());
  EXPECT_TRUE(at("[::]:1").IsWildcard());
  EXPECT_FALSE(at("0.0.0.0:1").IsLoopback());
}

TEST(Endpoints, ListsHaveNoDoubles) {
  EXPECT_EQ(ParseEndpoints("tcp://a:1, b:2").value().size(), 2U);
  EXPECT_TRUE(ParseEndpoints("").value().empty());
  EXPECT_EQ(ParseEndpoints("tcp://a:1,a:1").error().message(), "tcp://a:1 is named twice");
}

TEST(VersionTest, NamesWhatIsLoaded) {
  const std::string text = FullVersionText();
  EXPECT_THAT(text, HasSubstr("kvrelay "));
  EXPECT_THAT(text, HasSubstr("loaded: UCX 1."));
  EXPECT_THAT(text, HasSubstr(", ZeroMQ 4."));
}

}  // namespace
}  // namespace kvrelay::tools
