#include "proto/envelope.h"

#include <gtest/gtest.h>

#include <string>
#include <vector>

#include "proto/limits.h"

namespace kvrelay::proto {
namespace {

// {"v":[major,0],"t":type,"id":id,"more":false,"timeout_ms":0,"b":b"xyz"}
std::string Bytes(const std::string& major, const std::string& type, const std::string& id) {
  return "\x86\xa1v\x92" + major + std::string("\0\xa1t", 3) + type + "\xa2id" + id +
         "\xa4more\xc2\xaatimeout_ms" +
         std::string(
             "\0\xa1"
             "b\xc4\x03xyz",
             8);
}
const std::string kPing = "\xa4PING";

BadEnvelope Bad(std::string_view bytes) {
  const auto decoded = DecodeEnvelope(bytes);
  if (decoded) return {Status::Ok(), "none", decoded->id};
  return decoded.error();
}

TEST(Envelope, SurvivesARoundTrip) {
  for (int type = 0; TypeName(static_cast<Type>(type)) != "UNKNOWN"; ++type) {
    for (const uint64_t id : {uint64_t{1}, UINT64_MAX}) {
      const std::string body("\0\xff", 2);
      const auto decoded =
          DecodeEnvelope(EncodeEnvelope({static_cast<Type>(type), id, id == 1, 4711, body}));
      ASSERT_TRUE(decoded.has_value()) << decoded.error().status.ToString();
      EXPECT_EQ(decoded->type, static_cast<Type>(type));
      EXPECT_EQ(decoded->id, id);
      EXPECT_EQ(decoded->more, id == 1);
      EXPECT_EQ(decoded->timeout_ms, 4711U);
    }
  }
}

TEST(Envelope, TheBodyPointsIntoTheBytes) {
  const std::string bytes = EncodeEnvelope({Type::kPing, 1, false, 0, "the body"});
  const auto decoded = DecodeEnvelope(bytes);
  ASSERT_TRUE(decoded.has_value());
  EXPECT_EQ(decoded->body, "the body");
  EXPECT_EQ(decoded->body.data(), bytes.data() + bytes.size() - 8);
}

TEST(Envelope, TypeNamesAreUniqueAndFoundAgain) {
  int types = 0;
  for (; TypeName(static_cast<Type>(types)) != "UNKNOWN"; ++types) {
    EXPECT_EQ(TypeFromName(TypeName(static_cast<Type>(types))), static_cast<Type>(types));
  }
  EXPECT_EQ(types, static_cast<int>(Type::kCancelCall) + 1);
  EXPECT_EQ(TypeFromName("UNKNOWN"), std::nullopt);
  EXPECT_EQ(TypeFromName(""), std::nullopt);
}

TEST(Envelope, AnotherMajorVersionIsRefusedWithBothAndTheIdIsStillKnown) {
  EXPECT_EQ(Bad(Bytes("\x01", kPing, "\x05")).reason, "none");
  const BadEnvelope bad = Bad(Bytes("\x02", kPing, "\x05"));
  EXPECT_EQ(bad.status.ToString(),
            "kIncompatible: the peer speaks protocol 2.0, we speak " + VersionText());
  EXPECT_EQ(bad.reason, "version");
  EXPECT_EQ(bad.id, 5U);
  // A later version may have changed everything but "v" and "id".
  const BadEnvelope later = Bad("\x82\xa2id\x09\xa1v\x92\x03\x01");
  EXPECT_EQ(later.status.ToString(),
            "kIncompatible: the peer speaks protocol 3.1, we speak " + VersionText());
  EXPECT_EQ(later.id, 9U);
}

TEST(Envelope, AnotherMinorVersionIsUnderstood) {
  std::string bytes = Bytes("\x01", kPing, "\x05");
  bytes[5] = 7;
  EXPECT_EQ(Bad(bytes).reason, "none");
}

TEST(Envelope, AnUnknownTypeIsNamedAndCutToALineLength) {
  const BadEnvelope bad = Bad(Bytes("\x01",
                                    "\xa5"
                                    "DANCE",
                                    "\x05"));
  EXPECT_EQ(bad.status.ToString(), "kInvalidArgument: envelope: unknown message type 'DANCE'");
  EXPECT_EQ(bad.reason, "type");
  EXPECT_EQ(bad.id, 5U);
  const std::string name(200, 'x');
  EXPECT_LT(Bad(Bytes("\x01", "\xd9\xc8" + name, "\x05")).status.message().size(), 120U);
}

TEST(Envelope, BrokenOnesNameTheField) {
  EXPECT_EQ(Bad(Bytes("\x01", kPing, "\xff")).status.ToString(),
            "kInvalidArgument: envelope: field 'id' is not a number >= 0");
  EXPECT_EQ(Bad(Bytes("\x01", kPing, std::string(1, '\0'))).status.ToString(),
            "kInvalidArgument: envelope: field 'id' is 0");
  EXPECT_EQ(Bad(Bytes("\xa1x", kPing, "\x05")).status.ToString(),
            "kInvalidArgument: envelope: field 'v' is not a number >= 0");
  EXPECT_EQ(Bad(Bytes("\x01", "\x07", "\x05")).status.ToString(),
            "kInvalidArgument: envelope: field 't' is not a string");
  EXPECT_EQ(Bad("\x80").status.ToString(), "kInvalidArgument: envelope: field 'id' is missing");
  EXPECT_EQ(Bad("").status.ToString(), "kInvalidArgument: envelope: truncated");
  const std::string good = Bytes("\x01", kPing, "\x05");
  for (size_t size = 0; size < good.size(); ++size) {
    const std::vector<char> cut(good.begin(), good.begin() + static_cast<ptrdiff_t>(size));
    const BadEnvelope bad = Bad({cut.data(), cut.size()});
    EXPECT_EQ(bad.status.ToString(), "kInvalidArgument: envelope: truncated") << size;
    EXPECT_EQ(bad.reason, "malformed");
  }
}

TEST(Envelope, TheLargestBodyFitsAndALargerMessageIsRefused) {
  const std::string body(kMaxBodyBytes, 'x');
  const std::string bytes = EncodeEnvelope({Type::kDescribe, UINT64_MAX, true, UINT32_MAX, body});
  EXPECT_LE(bytes.size(), kMaxMessageBytes);
  EXPECT_TRUE(DecodeEnvelope(bytes).has_value());
  const BadEnvelope bad = Bad(std::string(kMaxMessageBytes + 1, 'x'));
  EXPECT_EQ(bad.status.ToString(), "kTooLarge: envelope: 8388609 bytes, more than 8388608");
  EXPECT_EQ(bad.reason, "size");
}

}  // namespace
}  // namespace kvrelay::proto
