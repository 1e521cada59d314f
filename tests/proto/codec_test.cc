#include "proto/codec.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <functional>
#include <msgpack.hpp>
#include <string>
#include <vector>

#include "proto/limits.h"
#include "tests/proto/any_message.h"

namespace kvrelay::proto {
namespace {

// A message's map, taken apart so that tests can spoil it.
using Pairs = std::vector<std::pair<std::string, std::string>>;  // key, packed value

Pairs TakeApart(const std::string& bytes) {
  Pairs pairs;
  const msgpack::object_handle handle = msgpack::unpack(bytes.data(), bytes.size());
  const msgpack::object_map map = handle.get().via.map;
  for (uint32_t i = 0; i < map.size; ++i) {
    msgpack::sbuffer value;
    msgpack::pack(value, map.ptr[i].val);
    pairs.emplace_back(map.ptr[i].key.as<std::string>(), std::string(value.data(), value.size()));
  }
  return pairs;
}

std::string PutTogether(const Pairs& pairs) {
  msgpack::sbuffer out;
  msgpack::packer<msgpack::sbuffer> packer(out);
  packer.pack_map(static_cast<uint32_t>(pairs.size()));
  for (const auto& [key, value] : pairs) {
    packer.pack(key);
    out.write(value.data(), value.size());
  }
  return {out.data(), out.size()};
}

template <typename T>
std::string Why(std::string_view bytes) {
  const Result<T> decoded = Decode<T>(bytes);
  return decoded.has_value() ? "it decodes" : decoded.error().ToString();
}

template <typename T>
std::string Expected(const std::string& field, const std::string& what) {
  return "kInvalidArgument: " + std::string(Schema<T>::kName) + ": field '" + field + "' " + what;
}

class EveryMessage : public testing::Test {
 protected:
  EveryMessage() : trace_(__FILE__, __LINE__, "KVRELAY_SEED=" + std::to_string(seed_)) {}
  std::string Next(const AnyMessage& message) { return message.random(random_); }

 private:
  const uint64_t seed_ = TestSeed();
  const testing::ScopedTrace trace_;
  Random random_{seed_};
};

std::string Why(const AnyMessage& message, std::string_view bytes) {
  const Result<std::string> recoded = message.recode(bytes);
  return recoded.has_value() ? "it decodes" : recoded.error().ToString();
}

TEST_F(EveryMessage, HasAllItsMembersOnTheWire) {
  for (const AnyMessage& message : AllMessages()) EXPECT_TRUE(message.complete) << message.name;
}

TEST_F(EveryMessage, SurvivesARoundTrip) {
  for (const AnyMessage& message : AllMessages()) {
    SCOPED_TRACE(message.name);
    for (int i = 0; i < 200; ++i) {
      const std::string bytes = Next(message);
      const Result<std::string> recoded = message.recode(bytes);
      ASSERT_TRUE(recoded.has_value()) << recoded.error().ToString();
      ASSERT_EQ(*recoded, bytes);
    }
  }
}

TEST_F(EveryMessage, NamesEachFieldThatIsMissingOrTwiceThereOrOfTheWrongType) {
  for (const AnyMessage& message : AllMessages()) {
    const Pairs good = TakeApart(Next(message));
    for (size_t i = 0; i < good.size(); ++i) {
      const std::string field =
          "kInvalidArgument: " + std::string(message.name) + ": field '" + good[i].first + "' ";
      Pairs pairs = good;
      pairs.erase(pairs.begin() + static_cast<ptrdiff_t>(i));
      EXPECT_EQ(Why(message, PutTogether(pairs)), field + "is missing");

      pairs.insert(pairs.end(), 2, good[i]);
      EXPECT_EQ(Why(message, PutTogether(pairs)), field + "is there twice");

      pairs = good;
      pairs[i].second = "\xc0";  // nil is no value of any field
      const std::string why = Why(message, PutTogether(pairs));
      EXPECT_TRUE(why.starts_with(field + "is not ")) << why;
    }
  }
}

TEST_F(EveryMessage, MayHaveItsFieldsInAnyOrderAndUnknownOnesBesides) {
  const std::string nested("\x92\x81\xa1x\xc0\xcb\0\0\0\0\0\0\0\0", 14);
  for (const AnyMessage& message : AllMessages()) {
    SCOPED_TRACE(message.name);
    const std::string bytes = Next(message);
    Pairs pairs = TakeApart(bytes);
    std::reverse(pairs.begin(), pairs.end());
    pairs.insert(pairs.begin(), {"from_the_future", nested});
    pairs.push_back({"", "\xc2"});
    const Result<std::string> recoded = message.recode(PutTogether(pairs));
    ASSERT_TRUE(recoded.has_value()) << recoded.error().ToString();
    EXPECT_EQ(*recoded, bytes);
  }
}

TEST_F(EveryMessage, IsRefusedWhenCutOffAnywhereOrFollowedByAnything) {
  for (const AnyMessage& message : AllMessages()) {
    const std::string bytes = Next(message);
    const std::string refusal = "kInvalidArgument: " + std::string(message.name) + ": ";
    for (size_t size = 0; size < bytes.size(); ++size) {
      // An exact allocation, so that ASan sees a read past the end.
      const std::vector<char> cut(bytes.begin(), bytes.begin() + static_cast<ptrdiff_t>(size));
      EXPECT_EQ(Why(message, {cut.data(), cut.size()}), refusal + "truncated")
          << size << " of " << bytes.size();
    }
    EXPECT_EQ(Why(message, bytes + '\0'), refusal + "1 bytes after its end");
  }
}

TEST(Codec, NamesTheWholePathOfANestedField) {
  ClaimReply reply;
  reply.ranks.resize(3);
  std::string bytes = Encode(reply);
  const size_t last = bytes.rfind("head_begin");
  bytes[last] = 'H';
  EXPECT_EQ(Why<ClaimReply>(bytes),
            Expected<ClaimReply>("ranks[2].shard.head_begin", "is missing"));

  Meta meta;
  meta.table_hash_key = std::string(16, 'k');
  meta.layout.k.resize(2);
  bytes = Encode(meta);
  const std::string run("\x95\x02\0\0\0\0", 6);
  const size_t place = bytes.find(run);
  ASSERT_NE(place, std::string::npos);
  bytes[place + 4] = '\xff';  // -1
  EXPECT_EQ(Why<Meta>(bytes), Expected<Meta>("layout.k[0]", "is not a number >= 0"));
}

TEST(Codec, PlacesOfTensorsTravelAsRuns) {
  KvLayout layout;
  const size_t empty = Encode(layout).size();
  for (uint64_t i = 0; i < 80; ++i) {
    layout.k.push_back({3, (uint64_t{1} << 40) - i * 4096});
    layout.v.push_back({static_cast<RegionId>(i), 512});
  }
  std::string bytes = Encode(layout);
  EXPECT_LE(bytes.size() - empty, 48U);
  EXPECT_EQ(Decode<KvLayout>(bytes).value(), layout);
  layout.k[40].offset += 64;
  EXPECT_EQ(Decode<KvLayout>(Encode(layout)).value(), layout);

  layout.k.resize(kMaxLayers);
  EXPECT_EQ(Why<KvLayout>(Encode(layout)), "it decodes");
  layout.k.emplace_back();
  EXPECT_EQ(Why<KvLayout>(Encode(layout)).substr(0, 48),
            Expected<KvLayout>("k[3]", "is 945, more than 944").substr(0, 48));
}

TEST(Codec, NumbersAreExactAndBounded) {
  GetMeta meta;
  for (const uint64_t value : {UINT64_MAX, uint64_t{1} << 63, (uint64_t{1} << 53) + 1}) {
    meta.incarnation = value;
    EXPECT_EQ(Decode<GetMeta>(Encode(meta))->incarnation, value);
  }
  meta.rank = kMaxRanks + 1;
  EXPECT_EQ(Why<GetMeta>(Encode(meta)), Expected<GetMeta>("rank", "is 1025, more than 1024"));

  StartReply reply;  // slot: 32 bits
  Pairs pairs = TakeApart(Encode(reply));
  pairs[0].second = std::string("\xcf\0\0\0\1\0\0\0\0", 9);
  EXPECT_EQ(Why<StartReply>(PutTogether(pairs)),
            Expected<StartReply>("slot", "is 4294967296, more than 4294967295"));
}

TEST(Codec, DoublesMustBeFiniteAndMayComeAsIntegers) {
  Generate generate;
  for (const double bad : {std::numeric_limits<double>::infinity(), std::nan("")}) {
    generate.temperature = bad;
    EXPECT_EQ(Why<Generate>(Encode(generate)), Expected<Generate>("temperature", "is not finite"));
  }
  Pairs pairs = TakeApart(Encode(Generate{}));
  for (auto& [key, value] : pairs) {
    if (key == "temperature") value = "\x02";
    if (key == "top_p") value = "\xff";
  }
  const auto decoded = Decode<Generate>(PutTogether(pairs));
  ASSERT_TRUE(decoded.has_value());
  EXPECT_EQ(decoded->temperature, 2.0);
  EXPECT_EQ(decoded->top_p, -1.0);
}

TEST(Codec, EnumsTravelByName) {
  std::string bytes = Encode(Error{Code::kDraining, "bye"});
  EXPECT_NE(bytes.find("kDraining"), std::string::npos);
  bytes.replace(bytes.find("kDraining"), 9, "kFuturism");
  EXPECT_EQ(Decode<Error>(bytes)->code, Code::kInternal) << "an unknown error is still one";
  EXPECT_EQ(Why<Error>(Encode(Error{Code::kOk, ""})),
            Expected<Error>("code", "is kOk, which is no error"));

  bytes = Encode(KvLayout{});
  bytes.replace(bytes.find("fp32"), 4, "fp64");
  EXPECT_EQ(Why<KvLayout>(bytes), Expected<KvLayout>("dtype", "has the unknown value 'fp64'"));
}

TEST(Codec, StringsAndArraysAreBounded) {
  Generate generate;
  generate.request_id = std::string(kMaxName + 1, 'x');
  EXPECT_EQ(Why<Generate>(Encode(generate)),
            Expected<Generate>("request_id", "has 257 bytes, not 0 to 256"));
  generate.request_id.pop_back();
  generate.stop_ids.resize(kMaxStopIds + 1);
  EXPECT_EQ(Why<Generate>(Encode(generate)),
            Expected<Generate>("stop_ids", "has 1025 elements, more than 1024"));
  generate.stop_ids.pop_back();
  EXPECT_EQ(Why<Generate>(Encode(generate)), "it decodes");

  Meta meta;
  meta.table_hash_key = "15 bytes is few";
  EXPECT_EQ(Why<Meta>(Encode(meta)),
            Expected<Meta>("table_hash_key", "has 15 bytes, not 16 to 16"));

  ClaimReply claim;
  claim.tables.resize(2);
  for (BlockId block = 0; block <= kMaxBlocks; ++block) {
    claim.tables[block > kMaxBlocks / 2 ? 1 : 0].blocks.push_back(block);
  }
  EXPECT_EQ(Why<ClaimReply>(Encode(claim)),
            Expected<ClaimReply>("tables[1]", "has more than 524287 blocks"));
  claim.tables[1].blocks.pop_back();
  EXPECT_EQ(Why<ClaimReply>(Encode(claim)), "it decodes");
  claim.tables.assign(kMaxKinds + 1, {});
  EXPECT_EQ(Why<ClaimReply>(Encode(claim)),
            Expected<ClaimReply>("tables", "has 65 tables, more than 64"));
}

TEST(Codec, WholeMessagesAreBounded) {
  EXPECT_EQ(Why<CancelRequest>(std::string(kMaxBodyBytes + 1, '\0')),
            "kTooLarge: CANCEL: 8387585 bytes, more than 8387584");
  // {"a": [[...[nil]...]], "request_id": ""}
  const auto nested = [](uint32_t arrays) {
    return "\x82\xa1"
           "a" +
           std::string(arrays, '\x91') + "\xc0\xaarequest_id\xa0";
  };
  EXPECT_EQ(Why<CancelRequest>(nested(kMaxNesting - 1)), "it decodes");
  EXPECT_EQ(Why<CancelRequest>(nested(kMaxNesting)),
            "kInvalidArgument: CANCEL: nested deeper than 8");
  EXPECT_EQ(Why<CancelRequest>("\xde\x01\x01" + std::string(1000, '\0')),
            "kInvalidArgument: CANCEL: a map of 257 fields, more than 256");
  // {"a": [3 Mi times nil], ...}
  EXPECT_EQ(Why<CancelRequest>("\x82\xa1"
                               "a" +
                               std::string("\xdd\0\x30\0\1", 5) +
                               std::string(kMaxObjects + 1, '\xc0') + "\xaarequest_id\xa0"),
            "kInvalidArgument: CANCEL: more than 3145728 values");
}

TEST(Codec, AShortMessageCannotAskForMuchMemory) {
  // Lengths of 4 GiB in messages of a few bytes; under ASan an allocation of that size aborts.
  for (const std::string header : {"\xdd\xff\xff\xff\xff", "\xdb\xff\xff\xff\xff",
                                   "\xc6\xff\xff\xff\xff", "\xc9\xff\xff\xff\xff\1"}) {
    EXPECT_EQ(Why<CancelRequest>("\x81\xaarequest_id" + header),
              "kInvalidArgument: CANCEL: truncated");
  }
  EXPECT_EQ(Why<CancelRequest>("\xdf\xff\xff\xff\xff"),
            "kInvalidArgument: CANCEL: a map of 4294967295 fields, more than 256");
}

TEST(Codec, WhatIsNoMapIsRefused) {
  EXPECT_EQ(Why<Empty>("\x90"), "kInvalidArgument: EMPTY: not a map");
  EXPECT_EQ(Why<Empty>("\xc1"), "kInvalidArgument: EMPTY: not msgpack at byte 0");
  EXPECT_EQ(Why<Empty>("\x81\x01\x02"), "it decodes") << "an unknown field of another kind";
}

}  // namespace
}  // namespace kvrelay::proto
