// Every architecture of the engine between two daemons: whatever the tensor parallel sizes, with
// relay on, off and by itself the ids are those of Hugging Face transformers and of one process.
#include <fstream>
#include <string>
#include <vector>

#include "tests/integration/generator.h"
#include "tests/integration/harness.h"

namespace kvrelay::integration {
namespace {

// What transformers answers: prompts whose first `system_tokens` ids, where they are longer, are
// asked as the system prompt, and the ids that follow.
struct Oracle {
  std::vector<proto::Generate> requests;
  std::vector<std::vector<uint32_t>> expected;
};

Oracle ReadOracle(const std::string& model, size_t system_tokens) {
  std::ifstream file(std::string(KVRELAY_SOURCE_DIR) + "/tests/engine/data/hf_expected.json");
  const Json all = Json::parse(file);
  Oracle oracle;
  for (const Json& entry : all["cases"]) {
    if (entry["model"] != model) continue;
    const auto prompt = entry["prompt"].get<std::vector<uint32_t>>();
    oracle.expected.push_back(entry["expected"].get<std::vector<uint32_t>>());
    const auto split =
        prompt.begin() + static_cast<ptrdiff_t>(prompt.size() > system_tokens ? system_tokens : 0);
    oracle.requests.push_back(Greedy({prompt.begin(), split}, {split, prompt.end()},
                                     static_cast<uint32_t>(oracle.expected.back().size())));
  }
  return oracle;
}

// Prompts behind one system prompt, of ids that every test model has.
std::vector<proto::Generate> Sharers(size_t system_tokens) {
  constexpr uint32_t kIds = 80;
  const auto ids = [](size_t count, uint32_t salt) {
    std::vector<uint32_t> some;
    for (uint32_t i = 0; i < count; ++i) some.push_back(2 + (i * i + salt * 7 + i * salt) % kIds);
    return some;
  };
  std::vector<proto::Generate> requests;
  for (const uint32_t own : {1, 3, 16, 17, 40, 70}) {
    requests.push_back(Greedy(ids(system_tokens, 1), ids(own, own), 24));
  }
  return requests;
}

class Architectures : public Story, public testing::WithParamInterface<std::string> {
 protected:
  // All at once, so that those with the same system prompt decode together; `relay` as in the
  // daemon's flag.
  static void Check(const Daemon& decode, const std::vector<proto::Generate>& requests,
                    const std::vector<std::vector<uint32_t>>& expected, const std::string& relay) {
    const auto replies = AskAll(decode.endpoint(), requests, requests.size());
    for (size_t i = 0; i < requests.size(); ++i) {
      ASSERT_TRUE(replies[i].has_value()) << replies[i].error().ToString();
      EXPECT_EQ(replies[i]->token_ids, expected[i]) << "request " << i;
      if (relay == "auto") continue;  // what decodes together is a matter of time
      const bool relayed = relay == "on" && !requests[i].system_ids.empty();
      EXPECT_EQ(replies[i]->summary["relay"], relayed ? "on" : "off") << "request " << i;
    }
  }
};

TEST_P(Architectures, RelayOnOffAndAutoGiveTheSameIds) {
  constexpr size_t kSystemTokens = 37;  // two blocks, and a tail that travels with the prompt
  const std::string model = "tests/engine/data/" + GetParam();
  const std::string folder = std::string(KVRELAY_SOURCE_DIR) + "/" + model;
  const Oracle oracle = ReadOracle(model, kSystemTokens);
  ASSERT_FALSE(oracle.requests.empty());
  const std::vector<proto::Generate> sharers = Sharers(kSystemTokens);
  const auto alone = Reference(folder).Generate(sharers);
  Daemon& prefill = StartPrefill({"--model=" + folder, "--tp=2", "--pp=2", "--prefill_chunk=19"});
  ASSERT_TRUE(prefill.started());
  for (const std::string relay : {"on", "off", "auto"}) {
    SCOPED_TRACE("relay " + relay);
    Daemon& decode = StartDecode(
        {&prefill}, {"--model=" + folder, "--relay=" + relay, "--kv_layout=hnd", "--block_size=8"});
    ASSERT_TRUE(decode.started());
    Check(decode, oracle.requests, oracle.expected, relay);
    Check(decode, sharers, alone, relay);
    ExpectIdle(decode);
    decode.Kill();
  }
}

INSTANTIATE_TEST_SUITE_P(TinyModels, Architectures,
                         testing::Values("tiny-bias", "tiny-mistral", "tiny-qwen2", "tiny-qwen3",
                                         "tiny-deepseek"),
                         [](const auto& info) {
                           std::string name = info.param;
                           name[name.find('-')] = '_';
                           return name;
                         });

}  // namespace
}  // namespace kvrelay::integration
