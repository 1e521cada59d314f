// Token ids through prefill and decode daemons equal those of one process: tensor parallel sizes,
// layouts, transports, system prompts of any length, alone and 16 at a time. The full product is
// labelled "full"; here each pair of two factors' values comes up.
#include <algorithm>
#include <array>
#include <map>
#include <utility>

#include "tests/common/from_env.h"
#include "tests/integration/generator.h"
#include "tests/integration/harness.h"
#include "transport/ucx_one_sided.h"

namespace kvrelay::integration {
namespace {

struct Setting {
  int prefill_tp;
  int decode_tp;
  const char* prefill_layout;
  const char* decode_layout;
  const char* transport;
  size_t system_tokens;
  bool stream_pulls = true;
};

constexpr std::array<std::pair<int, int>, 7> kTp = {
    {{1, 1}, {2, 1}, {1, 2}, {4, 2}, {2, 4}, {4, 1}, {1, 4}}};
constexpr std::array<std::pair<const char*, const char*>, 4> kLayoutPairs = {
    {{"nhd", "nhd"}, {"nhd", "hnd"}, {"hnd", "nhd"}, {"hnd", "hnd"}}};
constexpr std::array<size_t, 20> kPromptLengths = {1,  2,  7,  15, 16,  17,  31,  32,  33,  47,
                                                   48, 49, 64, 80, 100, 127, 129, 200, 300, 420};
// At least one block's end is crossed. With a sanitizer it is the moves that count.
constexpr uint32_t kAnswerTokens = Slowness() > 1 ? 20 : 64;

// Those that this host has.
const std::vector<const char*>& Transports() {
  static const auto* names = transport::FindOneSidedLanes("").has_value()
                                 ? new std::vector<const char*>{"mapped", "ucx-packed", "ucx-get"}
                                 : new std::vector<const char*>{"mapped", "ucx-packed"};
  return *names;
}

// Once per process for each system prompt.
const std::vector<std::vector<uint32_t>>& Expected(const std::string& model, size_t system_tokens) {
  static std::map<size_t, std::vector<std::vector<uint32_t>>> cache;
  auto& expected = cache[system_tokens];
  if (expected.empty())
    expected =
        Reference(model).Generate(GreedyOfLengths(kPromptLengths, system_tokens, kAnswerTokens));
  return expected;
}

class Parity : public Story {
 protected:
  void Check(const Setting& setting, size_t alone_step) {
    SCOPED_TRACE(std::string("prefill TP ") + std::to_string(setting.prefill_tp) + " " +
                 setting.prefill_layout + ", decode TP " + std::to_string(setting.decode_tp) + " " +
                 setting.decode_layout + ", " + setting.transport + ", system prompt of " +
                 std::to_string(setting.system_tokens) +
                 (setting.stream_pulls ? "" : ", pulled after the prefill"));
    const std::string transport = std::string("--transport=") + setting.transport;
    Daemon& prefill = StartPrefill({"--tp=" + std::to_string(setting.prefill_tp), transport,
                                    std::string("--kv_layout=") + setting.prefill_layout});
    Daemon& decode = StartDecode(
        {&prefill}, {"--tp=" + std::to_string(setting.decode_tp), transport,
                     std::string("--kv_layout=") + setting.decode_layout,
                     std::string("--stream_pulls=") + (setting.stream_pulls ? "true" : "false")});
    ASSERT_TRUE(prefill.started() && decode.started());
    const std::vector<proto::Generate> requests =
        GreedyOfLengths(kPromptLengths, setting.system_tokens, kAnswerTokens);
    const std::string model = BundledModel();
    const auto& expected = Expected(model, setting.system_tokens);
    const auto together = AskAll(decode.endpoint(), requests, 16);
    for (size_t i = 0; i < requests.size(); ++i) {
      ASSERT_TRUE(together[i].has_value()) << together[i].error().ToString();
      EXPECT_EQ(together[i]->token_ids, expected[i]) << "prompt of " << kPromptLengths[i];
      EXPECT_EQ(together[i]->summary["kv"]["path"], setting.transport);
    }
    for (size_t i = 0; i < requests.size(); i += alone_step) {
      const auto alone = Ask(decode.endpoint(), requests[i]);
      ASSERT_TRUE(alone.has_value()) << alone.error().ToString();
      EXPECT_EQ(alone->token_ids, expected[i]) << "alone, prompt of " << kPromptLengths[i];
    }
    ExpectIdle(prefill);
    ExpectIdle(decode);
    prefill.Kill();
    decode.Kill();
  }

  // Some of the 24 combinations of the other factors: KVRELAY_PARITY_CONFIGS, four by default (one
  // in a sanitizer build). Over all tensor parallel sizes four bring up every pair of values, fewer
  // every value.
  void CheckSome(size_t tp) {
    const size_t most = Slowness() > 1 ? 1 : tests::FromEnv("KVRELAY_PARITY_CONFIGS", 4);
    const size_t step = kLayoutPairs.size() / std::clamp<size_t>(most, 1, kLayoutPairs.size());
    for (size_t layout = tp / 2 % step; layout < kLayoutPairs.size(); layout += step) {
      Check({.prefill_tp = kTp[tp].first,
             .decode_tp = kTp[tp].second,
             .prefill_layout = kLayoutPairs[layout].first,
             .decode_layout = kLayoutPairs[layout].second,
             .transport = Transports()[(tp + 2 * layout) % Transports().size()],
             .system_tokens = kSystemLengths[tp % kSystemLengths.size()],
             .stream_pulls = (tp + layout) % 3 != 0},
            9);
    }
  }
};

TEST_F(Parity, PrefillTp1DecodeTp1) { CheckSome(0); }
TEST_F(Parity, PrefillTp2DecodeTp1) { CheckSome(1); }
TEST_F(Parity, PrefillTp1DecodeTp2) { CheckSome(2); }
TEST_F(Parity, PrefillTp4DecodeTp2) { CheckSome(3); }
TEST_F(Parity, PrefillTp2DecodeTp4) { CheckSome(4); }
TEST_F(Parity, PrefillTp4DecodeTp1) { CheckSome(5); }
TEST_F(Parity, PrefillTp1DecodeTp4) { CheckSome(6); }

// Beside the product: what is above the carrier is ucx-packed's.
TEST_F(Parity, OverZmqPacked) {
  Check({.prefill_tp = 2,
         .decode_tp = 1,
         .prefill_layout = "nhd",
         .decode_layout = "hnd",
         .transport = "zmq-packed",
         .system_tokens = 77},
        9);
}

class FullParity : public Parity {};

TEST_F(FullParity, EveryCombination) {
  for (const auto& tp : kTp) {
    for (const auto& layouts : kLayoutPairs) {
      for (const char* transport : Transports()) {
        for (const size_t system_tokens : kSystemLengths) {
          Check({tp.first, tp.second, layouts.first, layouts.second, transport, system_tokens}, 1);
        }
      }
    }
  }
}

}  // namespace
}  // namespace kvrelay::integration
