#include "proto/ticket.h"

#include <gtest/gtest.h>

#include <string>

#include "proto/base64url.h"
#include "proto/codec.h"
#include "proto/limits.h"
#include "tests/proto/random_message.h"

namespace kvrelay::proto {
namespace {

std::string WhyNoTicket(std::string_view text) {
  const auto ticket = DecodeTicket(text);
  return ticket.has_value() ? "it decodes" : ticket.error().ToString();
}

TEST(Base64Url, SurvivesARoundTripAtEveryLength) {
  const uint64_t seed = TestSeed();
  SCOPED_TRACE("KVRELAY_SEED=" + std::to_string(seed));
  Random random(seed);
  for (size_t size = 0; size < 100; ++size) {
    std::string bytes(size, '\0');
    for (char& c : bytes) c = static_cast<char>(random());
    EXPECT_EQ(FromBase64Url(ToBase64Url(bytes)), bytes);
  }
  // RFC 4648, section 10, without padding.
  EXPECT_EQ(ToBase64Url("foobar"), "Zm9vYmFy");
  EXPECT_EQ(ToBase64Url("fooba"), "Zm9vYmE");
  EXPECT_EQ(ToBase64Url("foob"), "Zm9vYg");
  EXPECT_EQ(ToBase64Url("\xfb\xff"), "-_8");
}

TEST(Base64Url, HasOneTextForEachBytes) {
  for (const char* bad : {"A", "AAAAA", "AB", "AAB", "AA==", "A+A", "A/A", "A A", "AA\n", "\xff"}) {
    EXPECT_EQ(FromBase64Url(bad), std::nullopt) << bad;
  }
}

TEST(Ticket, SurvivesARoundTripAndIsSafeInUrlsAndLogs) {
  const uint64_t seed = TestSeed();
  SCOPED_TRACE("KVRELAY_SEED=" + std::to_string(seed));
  Random random(seed);
  for (int i = 0; i < 200; ++i) {
    const auto ticket = RandomMessage<Ticket>(random);
    const std::string text = EncodeTicket(ticket);
    EXPECT_EQ(
        text.find_first_not_of("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_."),
        std::string::npos);
    const auto decoded = DecodeTicket(text);
    ASSERT_TRUE(decoded.has_value()) << decoded.error().ToString();
    EXPECT_EQ(Encode(*decoded), Encode(ticket));
  }
}

TEST(Ticket, TheLargestOneFits) {
  Ticket ticket;
  ticket.front = std::string(kMaxEndpoint, 'x');
  ticket.incarnation = UINT64_MAX;
  ticket.prompt.first_token = kMaxTokens;
  ticket.prefixes.resize(kMaxPrefixes, ticket.prompt);
  EXPECT_EQ(WhyNoTicket(EncodeTicket(ticket)), "it decodes");
}

TEST(Ticket, DamageIsFound) {
  const std::string text = EncodeTicket(Ticket{});
  EXPECT_EQ(WhyNoTicket(text), "it decodes");
  for (size_t i = 0; i < text.size(); ++i) {
    std::string bad = text;
    bad[i] = bad[i] == 'A' ? 'B' : 'A';
    EXPECT_NE(WhyNoTicket(bad), "it decodes") << i;
    EXPECT_NE(WhyNoTicket(text.substr(0, i)), "it decodes") << i;
  }
  EXPECT_EQ(WhyNoTicket(text.substr(0, 29)),
            "kInvalidArgument: TICKET: has a wrong checksum; damaged");
  EXPECT_NE(WhyNoTicket(text + "A"), "it decodes");
}

TEST(Ticket, WhatIsNoTicketIsSaidToBeNone) {
  for (const char* bad : {"", "kvt1", "hello.world", "KVT1.AAAA"}) {
    EXPECT_EQ(WhyNoTicket(bad), "kInvalidArgument: TICKET: does not begin with 'kvt1.'") << bad;
  }
  EXPECT_EQ(WhyNoTicket("kvt.AAAA"), "kInvalidArgument: TICKET: has no version number");
  EXPECT_EQ(WhyNoTicket("kvt1x.AAAA"), "kInvalidArgument: TICKET: has no version number");
  EXPECT_EQ(WhyNoTicket("kvt2.AAAA"), "kIncompatible: TICKET: version 2, we understand 1");
  EXPECT_EQ(WhyNoTicket("kvt1.AA=="),
            "kInvalidArgument: TICKET: is not base64url; cut off or damaged");
  EXPECT_EQ(WhyNoTicket("kvt1.AAAA"),
            "kInvalidArgument: TICKET: is not base64url; cut off or damaged");
  EXPECT_EQ(WhyNoTicket("kvt1." + std::string(kMaxTicketText, 'A')),
            "kInvalidArgument: TICKET: 8197 characters, more than 8192");
}

}  // namespace
}  // namespace kvrelay::proto
