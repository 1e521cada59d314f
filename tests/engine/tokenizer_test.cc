#include "engine/tokenizer.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "engine_testing.h"

namespace kvrelay::engine {
namespace {

using testing::ElementsAre;
using testing::HasSubstr;
using testing::IsEmpty;

std::vector<uint32_t> Ids(std::string_view bytes) {
  std::vector<uint32_t> ids;
  for (const char c : bytes) ids.push_back(static_cast<uint8_t>(c) + 3U);
  return ids;
}

TEST(TokenizerTest, BosComesOnceAtTheVeryFront) {
  const Tokenizer tokenizer = Tokenizer::ByteLevel(2);
  const auto both = tokenizer.Encode("A", "b");
  EXPECT_THAT(both->system_ids, ElementsAre(2, 'A' + 3));
  EXPECT_THAT(both->token_ids, ElementsAre('b' + 3));
  const auto prompt = tokenizer.Encode("", "b");
  EXPECT_THAT(prompt->system_ids, IsEmpty());
  EXPECT_THAT(prompt->token_ids, ElementsAre(2, 'b' + 3));
  EXPECT_THAT(Tokenizer::ByteLevel(std::nullopt).Encode("", "")->token_ids, IsEmpty());
}

TEST(TokenizerTest, TheBundledModelReadsBytes) {
  const auto config = LoadModelConfig(SourcePath("models/bard-4m"));
  ASSERT_TRUE(config) << config.error().ToString();
  const auto tokenizer = Tokenizer::Load(SourcePath("models/bard-4m"), *config);
  ASSERT_TRUE(tokenizer) << tokenizer.error().ToString();
  EXPECT_THAT(tokenizer->Encode("", "a")->token_ids, ElementsAre(*config->bos_id, 'a' + 3));
}

TEST(TokenizerTest, OtherModelsRefuseTextClearly) {
  const TempDir dir;
  ModelConfig config;
  config.vocab_size = 300;
  EXPECT_THAT(Tokenizer::Load(dir.path(), config)->Encode("", "x").error().message(),
              HasSubstr("no tokenizer_config.json"));
  dir.Write("tokenizer_config.json", R"({"tokenizer_class":"LlamaTokenizer"})");
  const Status error = Tokenizer::Load(dir.path(), config)->Encode("", "x").error();
  EXPECT_EQ(error.code(), Code::kInvalidArgument);
  EXPECT_THAT(error.message(), HasSubstr("LlamaTokenizer"));
  EXPECT_THAT(error.message(), HasSubstr("token ids"));
  dir.Write("tokenizer_config.json", R"({"tokenizer_class":"ByT5Tokenizer"})");
  EXPECT_TRUE(Tokenizer::Load(dir.path(), config)->has_text());
  config.vocab_size = 258;
  EXPECT_THAT(Tokenizer::Load(dir.path(), config).error().message(), HasSubstr("258"));
  dir.Write("tokenizer_config.json", "{");
  EXPECT_EQ(Tokenizer::Load(dir.path(), config).error().code(), Code::kInvalidArgument);
}

TEST(TextStreamTest, GivesCompleteSequencesOnly) {
  const Tokenizer tokenizer = Tokenizer::ByteLevel(std::nullopt);
  const std::string text = "a\u00e9\u20ac\U0001F600z";  // one to four bytes
  TextStream stream(tokenizer);
  std::string out;
  std::vector<size_t> lengths;
  for (const uint32_t id : Ids(text)) {
    const std::string piece = stream.Add({&id, 1});
    if (!piece.empty()) lengths.push_back(piece.size());
    out += piece;
  }
  EXPECT_EQ(out, text);
  EXPECT_THAT(lengths, ElementsAre(1, 2, 3, 4, 1));
  EXPECT_EQ(stream.Finish(), "");
}

TEST(TextStreamTest, ReplacesWhatCanNeverBeText) {
  const Tokenizer tokenizer = Tokenizer::ByteLevel(std::nullopt);
  const std::string r = "\xEF\xBF\xBD";
  const auto decode = [&](std::string_view bytes) {
    TextStream stream(tokenizer);
    std::string out = stream.Add(Ids(bytes));
    return out + stream.Finish();
  };
  EXPECT_EQ(decode("\xff"
                   "a"),
            r + "a");
  EXPECT_EQ(decode("\xc0\x80"), r + r);                  // overlong
  EXPECT_EQ(decode("\xed\xa0\x80"), r + r + r);          // a surrogate
  EXPECT_EQ(decode("\xf4\x90\x80\x80"), r + r + r + r);  // above U+10FFFF
  EXPECT_EQ(decode("\xe2\x82"
                   "a"),
            r + "a");                // cut short by a letter
  EXPECT_EQ(decode("\xe2\x82"), r);  // cut short by the end
}

TEST(TextStreamTest, IdsThatStandForNoByteGiveNothing) {
  const Tokenizer tokenizer = Tokenizer::ByteLevel(0);
  TextStream stream(tokenizer);
  const std::vector<uint32_t> ids = {0, 1, 'x' + 3, 2, 259, 1'000'000};
  EXPECT_EQ(stream.Add(ids), "x");
}

}  // namespace
}  // namespace kvrelay::engine
