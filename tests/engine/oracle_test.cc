// Token ids equal those of Hugging Face transformers, however the work is split.
#include <gtest/gtest.h>

#include <algorithm>

#include "engine_testing.h"

namespace kvrelay::engine {
namespace {

struct Split {
  const char* name;
  uint32_t tp;
  uint32_t pp;
  KvFormat layout;
  RelayMode relay;
};
constexpr Split kSplits[] = {{"tp 1, nhd", 1, 1, KvFormat::kNhd, RelayMode::kAuto},
                             {"tp 2, pp 2, hnd", 2, 2, KvFormat::kHnd, RelayMode::kOn},
                             {"tp 4, nhd", 4, 1, KvFormat::kNhd, RelayMode::kOff}};

class OracleTest : public testing::TestWithParam<std::string> {};

// Where `got` leaves `want`, short; empty when it does not.
std::string Difference(const std::vector<uint32_t>& got, const std::vector<uint32_t>& want) {
  if (got == want) return {};
  const auto [a, b] = std::mismatch(got.begin(), got.end(), want.begin(), want.end());
  return "they part at token " + std::to_string(a - got.begin()) + " of " +
         std::to_string(want.size()) + ": got " + (a == got.end() ? "none" : std::to_string(*a)) +
         ", want " + (b == want.end() ? "none" : std::to_string(*b));
}

std::string TestName(const testing::TestParamInfo<std::string>& info) {
  std::string name = info.param.substr(info.param.rfind('/') + 1);
  for (char& c : name) {
    if (c == '-') c = '_';
  }
  return name;
}

TEST_P(OracleTest, AllAtOnceOnEverySplit) {
  const std::vector<OracleCase> cases = OracleCases(GetParam());
  ASSERT_FALSE(cases.empty());
  for (const Split& split : kSplits) {
    SCOPED_TRACE(split.name);
    EngineOptions options = SmallOptions(GetParam());
    options.tp = split.tp;
    options.pp = split.pp;
    options.kv_layout = split.layout;
    options.relay = split.relay;
    const auto engine = MakeEngine(options);
    std::vector<std::future<Answer>> answers;
    for (const OracleCase& one : cases) {
      answers.push_back(
          Start(*engine, GreedyRequest(one.prompt, static_cast<uint32_t>(one.expected.size()))));
    }
    for (size_t i = 0; i < cases.size(); ++i) {
      const Answer answer = Finish(std::move(answers[i]));
      EXPECT_TRUE(answer.outcome.status.ok()) << answer.outcome.status.ToString();
      EXPECT_EQ(Difference(answer.token_ids, cases[i].expected), "") << cases[i].name;
    }
    engine->prefixes().Clear();  // of prompts that begin alike
    EXPECT_EQ(engine->pool()->free_blocks(), options.kv_blocks);
  }
}

TEST_P(OracleTest, OneAtATimeInSmallChunks) {
  EngineOptions options = SmallOptions(GetParam());
  options.prefill_chunk = 7;
  options.block_size = 5;
  options.kv_blocks = 500;
  const auto engine = MakeEngine(options);
  for (const OracleCase& one : OracleCases(GetParam())) {
    if (one.prompt.size() > 200) continue;
    const Answer answer = Finish(
        Start(*engine, GreedyRequest(one.prompt, static_cast<uint32_t>(one.expected.size()))));
    EXPECT_EQ(Difference(answer.token_ids, one.expected), "") << one.name;
  }
}

INSTANTIATE_TEST_SUITE_P(HuggingFace, OracleTest, testing::ValuesIn(OracleModels()), TestName);

}  // namespace
}  // namespace kvrelay::engine
