#include "engine/checkpoint.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cmath>
#include <cstring>
#include <limits>
#include <random>

#include "engine/fingerprint.h"
#include "engine/half.h"
#include "engine_testing.h"

namespace kvrelay::engine {
namespace {

using testing::HasSubstr;

// A .safetensors file of a header and bytes of data, whatever they say.
std::string File(const std::string& header, const std::string& data) {
  const uint64_t length = header.size();
  std::string file(sizeof(length), '\0');
  std::memcpy(file.data(), &length, sizeof(length));
  return file + header + data;
}

std::string Floats(const std::vector<float>& values) {
  std::string bytes(values.size() * sizeof(float), '\0');
  std::memcpy(bytes.data(), values.data(), bytes.size());
  return bytes;
}

const char* const kTwoTensors = R"({"__metadata__":{"format":"pt"},)"
                                R"("a":{"dtype":"F32","shape":[2,3],"data_offsets":[0,24]},)"
                                R"("b":{"dtype":"BF16","shape":[2],"data_offsets":[24,28]}})";
const std::string kTwoTensorsData = Floats({1, 2, 3, 4, 5, 6}) + std::string("\x80\x3f\x00\xc0", 4);

TEST(CheckpointTest, ReadsBoxesAndWidens) {
  const TempDir dir;
  dir.Write("model.safetensors", File(kTwoTensors, kTwoTensorsData));
  const auto checkpoint = Checkpoint::Open(dir.path());
  ASSERT_TRUE(checkpoint) << checkpoint.error().ToString();
  std::vector<float> box(4);
  ASSERT_TRUE(
      checkpoint
          ->ReadMatrix("a", 2, 3, {.row_begin = 0, .rows = 2, .column_begin = 1, .columns = 2}, box)
          .ok());
  EXPECT_THAT(box, testing::ElementsAre(2, 3, 5, 6));
  std::vector<float> b(2);
  ASSERT_TRUE(checkpoint->ReadVector("b", b).ok());
  EXPECT_THAT(b, testing::ElementsAre(1.0F, -2.0F));

  EXPECT_THAT(checkpoint->ReadVector("c", b).message(), HasSubstr("lacks tensor c"));
  const Status shape = checkpoint->ReadMatrix("a", 3, 2, {0, 3, 0, 2}, std::span(box).first(0));
  EXPECT_THAT(shape.message(), HasSubstr("F32 [2, 3]"));
  EXPECT_THAT(shape.message(), HasSubstr("F32 [3, 2]"));
}

// A rank's part is that part of the whole; another name has other numbers.
TEST(CheckpointTest, DummyNumbersDependOnNameAndPlace) {
  const Checkpoint checkpoint = Checkpoint::Dummy();
  EXPECT_TRUE(checkpoint.tensors().empty());
  std::vector<float> all(40 * 50);
  ASSERT_TRUE(checkpoint.ReadMatrix("a", 40, 50, {0, 40, 0, 50}, all).ok());
  std::vector<float> part(20 * 7);
  ASSERT_TRUE(checkpoint.ReadMatrix("a", 40, 50, {20, 20, 3, 7}, part).ok());
  double squares = 0;
  for (const float x : all) squares += double{x} * x;
  EXPECT_NEAR(std::sqrt(squares / static_cast<double>(all.size())), 0.02, 0.002);
  for (size_t i = 0; i < part.size(); ++i) {
    ASSERT_EQ(part[i], all[(20 + i / 7) * 50 + 3 + i % 7]) << i;
  }
  std::vector<float> other(all.size());
  ASSERT_TRUE(checkpoint.ReadMatrix("b", 40, 50, {0, 40, 0, 50}, other).ok());
  EXPECT_NE(other, all);
  std::vector<float> norm(3);
  ASSERT_TRUE(checkpoint.ReadVector("norm.weight", norm).ok());
  EXPECT_THAT(norm, testing::ElementsAre(1, 1, 1));
}

TEST(CheckpointTest, OtherTypesAreCarriedButNotRead) {
  const TempDir dir;
  dir.Write("model.safetensors", File(R"({"i":{"dtype":"I64","shape":[1],"data_offsets":[0,8]}})",
                                      std::string(8, '\0')));
  std::vector<float> out(1);
  const auto checkpoint = Checkpoint::Open(dir.path());
  ASSERT_TRUE(checkpoint);
  EXPECT_THAT(checkpoint->ReadVector("i", out).message(), HasSubstr("F32, F16, BF16"));
}

struct Damage {
  const char* name;
  std::string file;
  const char* says;
};

class DamagedFileTest : public testing::TestWithParam<Damage> {};

TEST_P(DamagedFileTest, IsRefusedClearly) {
  const TempDir dir;
  dir.Write("model.safetensors", GetParam().file);
  const auto checkpoint = Checkpoint::Open(dir.path());
  ASSERT_FALSE(checkpoint);
  EXPECT_EQ(checkpoint.error().code(), Code::kInvalidArgument);
  EXPECT_THAT(checkpoint.error().message(), HasSubstr("model.safetensors"));
  EXPECT_THAT(checkpoint.error().message(), HasSubstr(GetParam().says));
}

std::string One(const std::string& body) { return "{\"t\":{" + body + "}}"; }
const std::string kFour = std::string(4, '\0');

INSTANTIATE_TEST_SUITE_P(
    Hostile, DamagedFileTest,
    testing::Values(
        Damage{"Empty", "", "bytes"}, Damage{"ShorterThanALength", "1234", "too few"},
        Damage{"HeaderLongerThanFile", std::string("\xff\0\0\0\0\0\0\0{}", 10), "claims 255"},
        Damage{"HeaderLengthOverflows", std::string(8, '\xff') + "{}", "claims"},
        Damage{"NotJson", File("{\"a\":", ""), "not valid JSON"},
        Damage{"NotAnObject", File("[]", ""), "not a JSON object"},
        Damage{"Deep", File("{\"a\":" + std::string(200'000, '[') + "}", ""), "nested"},
        Damage{"DataShorterThanHeaderSays", File(kTwoTensors, kTwoTensorsData.substr(0, 20)),
               "holds only 20"},
        Damage{"DataLongerThanHeaderSays", File(kTwoTensors, kTwoTensorsData + "x"), "29"},
        Damage{"Entry", File(R"({"t":3})", ""), "tensor t"},
        Damage{"NoType", File(One(R"("shape":[1],"data_offsets":[0,4])"), kFour), "dtype"},
        Damage{"UnknownType", File(One(R"("dtype":"F3","shape":[1],"data_offsets":[0,4])"), kFour),
               "F3"},
        Damage{"NegativeShape",
               File(One(R"("dtype":"F32","shape":[-1],"data_offsets":[0,4])"), kFour), "shape"},
        Damage{"ShapeOverflows",
               File(One(R"("dtype":"F32","shape":[4294967296,4294967296],"data_offsets":[0,4])"),
                    kFour),
               "span 4 bytes"},
        Damage{"ShapeUnlikeOffsets",
               File(One(R"("dtype":"F32","shape":[2],"data_offsets":[0,4])"), kFour), "F32 [2]"},
        Damage{"OffsetsBackwards",
               File(One(R"("dtype":"F32","shape":[1],"data_offsets":[4,0])"), kFour),
               "data_offsets"},
        Damage{"OffsetsOutside",
               File(One(R"("dtype":"F32","shape":[1],"data_offsets":[8,12])"), kFour), "byte 12"},
        Damage{"Overlap",
               File(R"({"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},)"
                    R"("b":{"dtype":"F16","shape":[1],"data_offsets":[2,4]}})",
                    kFour),
               "overlap"},
        Damage{"Hole",
               File(R"({"a":{"dtype":"F32","shape":[1],"data_offsets":[4,8]}})", kFour + kFour),
               "hole"}),
    [](const auto& info) { return info.param.name; });

TEST(CheckpointTest, FlippedHeaderBytesNeverCrash) {
  std::mt19937_64 random(TestSeed());
  const std::string good = File(kTwoTensors, kTwoTensorsData);
  const TempDir dir;
  for (int round = 0; round < 500; ++round) {
    std::string bad = good;
    for (uint64_t i = 0; i <= random() % 3; ++i) {
      bad[random() % bad.size()] = static_cast<char>(random());
    }
    dir.Write("model.safetensors", bad);
    const auto checkpoint = Checkpoint::Open(dir.path());
    if (!checkpoint) continue;
    std::vector<float> a(6);
    (void)checkpoint->ReadMatrix("a", 2, 3, {0, 2, 0, 3}, a);
  }
}

TEST(CheckpointTest, AFolderWithoutWeightsSaysSo) {
  const TempDir dir;
  const auto checkpoint = Checkpoint::Open(dir.path());
  ASSERT_FALSE(checkpoint);
  EXPECT_EQ(checkpoint.error().code(), Code::kNotFound);
  EXPECT_THAT(checkpoint.error().message(), HasSubstr("model.safetensors.index.json"));
}

TEST(CheckpointTest, TheIndexCannotLeaveTheFolder) {
  const TempDir dir;
  for (const char* name : {"../model.safetensors", "/etc/passwd", ""}) {
    dir.Write("model.safetensors.index.json",
              std::string(R"({"weight_map":{"a":")") + name + "\"}}");
    const auto checkpoint = Checkpoint::Open(dir.path());
    ASSERT_FALSE(checkpoint);
    EXPECT_THAT(checkpoint.error().message(), HasSubstr("same folder")) << name;
  }
}

// Two tensors, in one file or in two.
void WriteModel(const TempDir& dir, bool sharded, float value) {
  const std::string a = R"("a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]})";
  const std::string b = R"("b":{"dtype":"F32","shape":[1],"data_offsets":[0,4]})";
  const std::string b_second = R"("b":{"dtype":"F32","shape":[1],"data_offsets":[4,8]})";
  if (!sharded) {
    dir.Write("model.safetensors", File("{" + a + "," + b_second + "}", Floats({1, value})));
    return;
  }
  dir.Write("one.safetensors", File("{" + a + "}", Floats({1})));
  dir.Write("two.safetensors", File("{" + b + "}", Floats({value})));
  dir.Write("model.safetensors.index.json",
            R"({"weight_map":{"a":"one.safetensors","b":"two.safetensors"}})");
}

TEST(CheckpointTest, ATensorMissingFromItsShardIsNamed) {
  const TempDir dir;
  WriteModel(dir, true, 2);
  dir.Write("two.safetensors", File("{}", ""));
  EXPECT_THAT(Checkpoint::Open(dir.path()).error().message(), HasSubstr("lacks tensor b"));
}

TEST(FingerprintTest, DependsOnContentNotOnFiles) {
  const TempDir one;
  const TempDir two;
  const TempDir other;
  WriteModel(one, false, 2);
  WriteModel(two, true, 2);
  WriteModel(other, true, 3);
  ModelConfig config;
  config.hidden_size = 32;
  const auto print = [&](const TempDir& dir) {
    return ModelFingerprint(config, *Checkpoint::Open(dir.path()));
  };
  EXPECT_EQ(print(one), print(two));
  EXPECT_NE(print(one), print(other));
  const ContentHash before = print(one);
  config.eos_ids = {7};
  EXPECT_EQ(print(one), before);
  config.rope.theta = 500000;
  EXPECT_NE(print(one), before);
}

TEST(FingerprintTest, PrefixAndPromptOfTheSameIdsDiffer) {
  const std::vector<uint32_t> ids = {1, 2, 3};
  const ContentHash model{{1}};
  EXPECT_EQ(PrefixHash(model, ids), PrefixHash(model, ids));
  EXPECT_NE(PrefixHash(model, ids), PromptHash(model, ids));
  EXPECT_NE(PrefixHash(model, ids), PrefixHash(ContentHash{{2}}, ids));
}

TEST(HalfTest, KnownValues) {
  EXPECT_EQ(FloatFromHalf(0x0001), 0x1p-24F);
  EXPECT_EQ(FloatFromHalf(0x03FF), 1023 * 0x1p-24F);
  EXPECT_EQ(FloatFromHalf(0x8400), -0x1p-14F);
  EXPECT_EQ(FloatFromHalf(0x3555), 0.333251953125F);
  EXPECT_EQ(FloatFromHalf(0x7BFF), 65504.0F);
  EXPECT_EQ(FloatFromHalf(0xFC00), -std::numeric_limits<float>::infinity());
  EXPECT_TRUE(std::isnan(FloatFromHalf(0x7C01)));
  EXPECT_EQ(FloatFromBf16(0xC049), -3.140625F);
}

}  // namespace
}  // namespace kvrelay::engine
