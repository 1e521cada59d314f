#include "base/hash.h"

#include <gtest/gtest.h>

#include <string_view>
#include <vector>

namespace kvrelay {
namespace {

std::span<const std::byte> Bytes(std::string_view text) { return std::as_bytes(std::span(text)); }

// The values are part of the protocol: `python3 -c 'import hashlib;
// print(hashlib.blake2b(b"\x06promptabc", digest_size=16).hexdigest())'`
TEST(ContentHash, IsBlake2b128OfDomainAndBytes) {
  EXPECT_EQ(HashBytes(Bytes("abc"), "prompt").ToHex(), "9aefe56334ace04814eea180444b2662");
  EXPECT_EQ(HashBytes({}).ToHex(), "7025e075d5e2f6cde3cc051a31f07660");
}

TEST(ContentHash, DomainsKeepEqualBytesApart) {
  EXPECT_NE(HashBytes(Bytes("abc"), "prompt"), HashBytes(Bytes("abc"), "prefix"));
  EXPECT_NE(HashBytes(Bytes("bc"), "a"), HashBytes(Bytes("abc")));
  EXPECT_NE(HashBytes(Bytes("c"), "ab"), HashBytes(Bytes("bc"), "a"));
}

TEST(ContentHash, PiecesGiveTheSameAsTheWhole) {
  ContentHasher hasher("model");
  hasher.Update(Bytes("a"));
  hasher.Update({});
  hasher.Update(Bytes("bc"));
  EXPECT_EQ(hasher.Finish(), HashBytes(Bytes("abc"), "model"));
}

TEST(ContentHash, IntegersAreLittleEndian) {
  const std::vector<uint32_t> tokens = {0x64636261, 0x68676665};
  ContentHasher hasher("prompt");
  hasher.UpdateInts(std::span(tokens));
  EXPECT_EQ(hasher.Finish(), HashBytes(Bytes("abcdefgh"), "prompt"));
}

// The reference vector of SipHash-2-4: key 00..0f, input 00..0e.
TEST(KeyedHash, IsSipHash24) {
  HashKey key;
  for (size_t i = 0; i < key.size(); ++i) key[i] = static_cast<uint8_t>(i);
  std::vector<std::byte> input(15);
  for (size_t i = 0; i < input.size(); ++i) input[i] = static_cast<std::byte>(i);
  EXPECT_EQ(KeyedHash(key, input), 0xa129ca6149be45e5U);
}

TEST(KeyedHash, AnotherKeyGivesAnotherValue) {
  const HashKey a = RandomHashKey();
  const HashKey b = RandomHashKey();
  EXPECT_EQ(KeyedHash(a, Bytes("table")), KeyedHash(a, Bytes("table")));
  EXPECT_NE(KeyedHash(a, Bytes("table")), KeyedHash(b, Bytes("table")));
}

}  // namespace
}  // namespace kvrelay
