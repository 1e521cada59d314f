// Flags as CLI users write them, and every way to get them wrong.
#include "tools/common/flags.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <unistd.h>

#include <filesystem>
#include <fstream>
#include <map>

namespace kvrelay::tools {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;
using ::testing::IsEmpty;
using ::testing::Not;

class FlagsTest : public ::testing::Test {
 protected:
  FlagsTest() {
    flags_.Text("model", &model_, "DIR", "model folder");
    flags_.Section("Sampling");
    flags_.Whole("max_new_tokens", &max_new_tokens_, 1, 4096, "tokens to generate");
    flags_.Real("temperature", &temperature_, 0, 10, "0 is greedy");
    flags_.Switch("ignore_eos", &ignore_eos_, "go on behind the end");
    flags_.Switch("colour", &colour_, "colours");
    flags_.Choice("relay", &relay_, {"auto", "on", "off"}, "relay attention");
    flags_.Ids("token_ids", &token_ids_, "prompt");
  }

  ~FlagsTest() override {
    if (!file_.empty()) std::filesystem::remove(file_);
  }

  Result<Action> Parse(std::vector<std::string> args) {
    return flags_.Parse(args, [this](const std::string& name) -> std::optional<std::string> {
      const auto it = environment_.find(name);
      if (it == environment_.end()) return std::nullopt;
      return it->second;
    });
  }

  std::string ParseError(std::vector<std::string> args) {
    const Result<Action> action = Parse(std::move(args));
    if (action) return "no error";
    EXPECT_EQ(action.error().code(), Code::kInvalidArgument);
    return action.error().message();
  }

  std::string File(const std::string& content) {
    file_ =
        std::filesystem::temp_directory_path() / ("kvrelay_flags_" + std::to_string(::getpid()));
    std::ofstream(file_) << content;
    return file_;
  }

  std::string SourceOf(const std::string& name) {
    for (const EffectiveFlag& flag : flags_.Effective()) {
      if (flag.name == name) return flag.value + " from " + flag.source;
    }
    return "no such flag";
  }

  std::string model_;
  uint32_t max_new_tokens_ = 64;
  double temperature_ = 0;
  bool ignore_eos_ = false;
  bool colour_ = true;
  std::string relay_ = "auto";
  std::vector<uint32_t> token_ids_;
  std::map<std::string, std::string> environment_;
  std::string file_;
  FlagSet flags_{"kvrelay sample --model=DIR [flags]", "Does nothing.", "kvrelay sample --model=m"};
};

TEST_F(FlagsTest, EverySpellingOfAValueIsUnderstood) {
  for (const std::vector<std::string>& args :
       std::vector<std::vector<std::string>>{{"--max_new_tokens=7"},
                                             {"--max-new-tokens=7"},
                                             {"--max_new_tokens", "7"},
                                             {"--max-new-tokens", "7"},
                                             {"-max_new_tokens=7"}}) {
    FlagSet flags("kvrelay sample", "", "");
    uint32_t value = 0;
    flags.Whole("max_new_tokens", &value, 1, 4096, "");
    ASSERT_TRUE(flags.Parse(args, [](const std::string&) { return std::nullopt; })) << args.front();
    EXPECT_EQ(value, 7U) << args.front();
  }
}

TEST_F(FlagsTest, SwitchesTakeNoSeparateValue) {
  ASSERT_TRUE(Parse({"--ignore-eos", "--nocolour"}));
  EXPECT_TRUE(ignore_eos_);
  EXPECT_FALSE(colour_);
}

TEST_F(FlagsTest, SwitchesTakeAValueBehindEquals) {
  ASSERT_TRUE(Parse({"--ignore_eos=true", "--colour=false"}));
  EXPECT_TRUE(ignore_eos_);
  EXPECT_FALSE(colour_);
}

TEST_F(FlagsTest, ValuesMayHoldAnything) {
  ASSERT_TRUE(Parse({"--model=/a b=c/--x", "--token_ids=", "--temperature=1e-1"}));
  EXPECT_EQ(model_, "/a b=c/--x");
  EXPECT_THAT(token_ids_, IsEmpty());
  EXPECT_DOUBLE_EQ(temperature_, 0.1);
}

TEST_F(FlagsTest, IdsAreAList) {
  ASSERT_TRUE(Parse({"--token_ids", "0,17,4294967295"}));
  EXPECT_THAT(token_ids_, ElementsAre(0U, 17U, 4294967295U));
}

TEST_F(FlagsTest, HelpAndVersionWinOverErrors) {
  EXPECT_EQ(Parse({"--nonsense", "--help"}).value(), Action::kHelp);
  EXPECT_EQ(Parse({"-h"}).value(), Action::kHelp);
  EXPECT_EQ(Parse({"stray", "--version"}).value(), Action::kVersion);
}

TEST_F(FlagsTest, FlagThenFileThenEnvironmentThenDefault) {
  const std::string file =
      File("# for the tests\n\n--max_new_tokens=20\n--temperature=0.5\n  --ignore-eos  \n");
  environment_ = {{"KVRELAY_MAX_NEW_TOKENS", "30"},
                  {"KVRELAY_TEMPERATURE", "0.7"},
                  {"KVRELAY_RELAY", "on"},
                  {"KVRELAY_SOMETHING_ELSE", "ignored"}};
  ASSERT_TRUE(Parse({"--max_new_tokens=10", "--flagfile=" + file}));
  EXPECT_EQ(SourceOf("max_new_tokens"), "10 from flag");
  EXPECT_EQ(SourceOf("temperature"), "0.5 from file " + file + ":4");
  EXPECT_EQ(SourceOf("ignore_eos"), "true from file " + file + ":5");
  EXPECT_EQ(SourceOf("relay"), "on from environment KVRELAY_RELAY");
  EXPECT_EQ(SourceOf("colour"), "true from default");
  EXPECT_EQ(max_new_tokens_, 10U);
  EXPECT_EQ(temperature_, 0.5);
  EXPECT_EQ(relay_, "on");
  EXPECT_TRUE(flags_.Given("relay"));
  EXPECT_FALSE(flags_.Given("colour"));
}

TEST_F(FlagsTest, TheEnvironmentCanNameTheFile) {
  environment_ = {{"KVRELAY_FLAGFILE", File("--relay=off\n")}};
  ASSERT_TRUE(Parse({}));
  EXPECT_EQ(relay_, "off");
}

TEST_F(FlagsTest, AnUnknownFlagIsAnErrorWithAGuess) {
  EXPECT_EQ(ParseError({"--max_new_token=1"}),
            "unknown flag --max_new_token (did you mean --max_new_tokens?)");
  EXPECT_EQ(ParseError({"--logtostderr"}), "unknown flag --logtostderr");
}

TEST_F(FlagsTest, ARepeatedFlagIsAnErrorInWhateverSpelling) {
  EXPECT_EQ(ParseError({"--max_new_tokens=1", "--max-new-tokens", "2"}),
            "--max_new_tokens is given twice (1, then 2)");
}

TEST_F(FlagsTest, ARepeatedFileIsAnError) {
  EXPECT_EQ(ParseError({"--flagfile=a", "--flagfile=b"}), "--flagfile is given twice (a, then b)");
}

TEST_F(FlagsTest, AStrayArgumentIsAnError) {
  EXPECT_EQ(ParseError({"--ignore_eos", "true"}), "stray argument 'true'");
  EXPECT_EQ(ParseError({"-"}), "stray argument '-'");
}

TEST_F(FlagsTest, AMissingValueIsAnError) {
  EXPECT_EQ(ParseError({"--model"}), "--model needs a value");
  EXPECT_EQ(ParseError({"--model", "--ignore_eos"}), "--model needs a value");
}

struct BadValue {
  std::string flag;
  std::vector<std::string> values;
  std::string wanted;
};

class BadValueTest : public FlagsTest, public ::testing::WithParamInterface<BadValue> {};

TEST_P(BadValueTest, IsRefusedWithWhatWouldBeRight) {
  for (const std::string& value : GetParam().values) {
    const std::string arg = "--" + GetParam().flag + "=" + value;
    EXPECT_EQ(ParseError({arg}), arg + " " + GetParam().wanted);
  }
}

INSTANTIATE_TEST_SUITE_P(
    Matrix, BadValueTest,
    ::testing::Values(BadValue{"max_new_tokens",
                               {"", "0", "4097", "-1", "+1", "1.5", "7x", " 7", "0x10",
                                "99999999999999999999"},
                               "needs a whole number from 1 to 4096"},
                      BadValue{"temperature",
                               {"", "-0.1", "11", "nan", "inf", "hot", "1,5"},
                               "needs a number from 0 to 10"},
                      BadValue{"ignore_eos", {"", "maybe", "2"}, "needs true or false"},
                      BadValue{"relay", {"", "ON", "sometimes"}, "needs one of auto|on|off"},
                      BadValue{"token_ids",
                               {"1,", ",1", "1,,2", "1 2", "a", "-1", "4294967296"},
                               "needs whole numbers with commas between, like 1,2,3"}),
    [](const auto& test) { return test.param.flag; });

TEST_F(FlagsTest, ErrorsOfAFileNameItsLine) {
  const std::string file = File("--relay=on\n--relay=off\n");
  EXPECT_EQ(ParseError({"--flagfile=" + file}), "file " + file + ":2: --relay is given twice");
}

TEST_F(FlagsTest, UnknownFlagsOfAFileAreErrors) {
  const std::string file = File("\n--rely=on\n");
  EXPECT_EQ(ParseError({"--flagfile=" + file}),
            "file " + file + ":2: unknown flag --rely (did you mean --relay?)");
}

TEST_F(FlagsTest, AnAbsentFileIsAnError) {
  EXPECT_EQ(ParseError({"--flagfile=/nowhere/x"}), "--flagfile=/nowhere/x cannot be read");
}

TEST_F(FlagsTest, ABadValueOfTheEnvironmentNamesTheVariable) {
  environment_ = {{"KVRELAY_RELAY", "perhaps"}};
  EXPECT_EQ(ParseError({}),
            "--relay=perhaps (from environment KVRELAY_RELAY) needs one of auto|on|off");
}

TEST_F(FlagsTest, AnArgumentIsTakenWhereverItStands) {
  for (const std::vector<std::string>& args :
       std::vector<std::vector<std::string>>{{"tcp://a:1", "--json"}, {"--json", "tcp://a:1"}}) {
    FlagSet flags("kvrelay inspect ENDPOINT", "", "");
    std::string endpoint;
    bool json = false;
    flags.Argument("ENDPOINT", &endpoint, "");
    flags.Switch("json", &json, "");
    ASSERT_TRUE(flags.Parse(args, [](const std::string&) { return std::nullopt; }));
    EXPECT_EQ(endpoint, "tcp://a:1");
    EXPECT_TRUE(json);
  }
}

TEST_F(FlagsTest, AMissingArgumentIsNamed) {
  std::string endpoint;
  flags_.Argument("ENDPOINT", &endpoint, "");
  EXPECT_EQ(ParseError({}), "ENDPOINT is missing");
}

TEST_F(FlagsTest, HelpShowsOurFlagsWithDefaultsAndAnExample) {
  const std::string help = flags_.Help();
  EXPECT_THAT(help, HasSubstr("Usage: kvrelay sample --model=DIR [flags]\n"));
  EXPECT_THAT(help, HasSubstr("\nSampling:\n"));
  EXPECT_THAT(help, HasSubstr("--max_new_tokens=N              tokens to generate (default 64)\n"));
  EXPECT_THAT(help, HasSubstr("--relay=auto|on|off             relay attention (default auto)\n"));
  EXPECT_THAT(help, HasSubstr("--colour                        colours (default on)\n"));
  EXPECT_THAT(help, HasSubstr("\nExample:\n  kvrelay sample --model=m\n"));
  EXPECT_THAT(help, Not(HasSubstr("logtostderr"))) << "flags of libraries are not ours";
  EXPECT_EQ(flags_.program(), "kvrelay sample");
}

TEST_F(FlagsTest, HelpFitsAHundredColumns) {
  flags_.Switch("verbose_beyond_every_measure_known_to_us", &colour_,
                "a long explanation that goes on and on, so that it has to be wrapped more than "
                "once before it has said what it has to say, which is not much after all");
  std::istringstream lines(flags_.Help());
  for (std::string line; std::getline(lines, line);) EXPECT_LE(line.size(), 100U) << line;
}

TEST(AsksForJsonTest, IsReadableFromArgumentsThatDoNotParse) {
  EXPECT_TRUE(AsksForJson(std::vector<std::string>{"--nonsense", "--json"}));
  EXPECT_TRUE(AsksForJson(std::vector<std::string>{"--json=true"}));
  EXPECT_FALSE(AsksForJson(std::vector<std::string>{"--json=false", "json"}));
}

}  // namespace
}  // namespace kvrelay::tools
