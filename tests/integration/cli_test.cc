// The command line by itself: help, usage, failures, and the model in one process. No daemon runs
// here.
#include <gmock/gmock.h>

#include <csignal>

#include "tests/integration/harness.h"

namespace kvrelay::integration {
namespace {

using ::testing::HasSubstr;
using ::testing::IsEmpty;
using ::testing::Not;
using ::testing::SizeIs;
using ::testing::StartsWith;

class CliStory : public Story {
 protected:
  // A port that nobody listens on: 1 is reserved and never ours.
  static constexpr const char* kNobody = "tcp://127.0.0.1:1";

  void ExpectJsonError(const CliResult& result, int exit_code, const std::string& code,
                       bool retryable, const std::string& peer = "") {
    EXPECT_EQ(result.exit_code, exit_code) << result.out << result.err;
    const Json json = result.json();
    ASSERT_TRUE(json.is_object());
    EXPECT_EQ(json["schema"], 1);
    EXPECT_EQ(json["error"]["code"], code) << json;
    EXPECT_EQ(json["error"]["retryable"], retryable);
    EXPECT_EQ(json["error"]["peer"], peer);
    EXPECT_THAT(json["error"]["message"].get<std::string>(), Not(IsEmpty()));
  }
};

TEST_F(CliStory, AloneItPrintsAnOverviewAndExitsTwo) {
  const CliResult alone = Cli({});
  EXPECT_EQ(alone.exit_code, 2);
  EXPECT_THAT(alone.out, IsEmpty()) << "stdout carries results only";
  EXPECT_THAT(alone.err, HasSubstr("generate "));
  const CliResult help = Cli({"--help"});
  EXPECT_EQ(help.exit_code, 0);
  EXPECT_THAT(help.out, StartsWith("Usage: kvrelay COMMAND"));
  EXPECT_THAT(help.err, IsEmpty());
}

TEST_F(CliStory, EveryCommandHasHelpWithAnExampleAndOnlyOurFlags) {
  for (const std::string command : {"generate", "inspect", "health", "ping", "backends", "demo"}) {
    const CliResult help = Cli({command, "--help"});
    EXPECT_EQ(help.exit_code, 0) << command;
    EXPECT_THAT(help.out, StartsWith("Usage: kvrelay " + command)) << command;
    EXPECT_THAT(help.out, HasSubstr("--json")) << command;
    EXPECT_THAT(help.out, HasSubstr("Example:\n  kvrelay " + command)) << command;
    EXPECT_THAT(help.out, Not(HasSubstr("minloglevel"))) << command;
    EXPECT_THAT(help.err, IsEmpty()) << command;
  }
}

TEST_F(CliStory, TheVersionNamesTheLibraries) {
  const CliResult version = Cli({"--version"});
  EXPECT_EQ(version.exit_code, 0);
  EXPECT_THAT(version.out, HasSubstr("UCX"));
  EXPECT_THAT(version.out, HasSubstr("ZeroMQ"));
  EXPECT_EQ(Cli({"ping", "--version"}).out, version.out);
}

TEST_F(CliStory, WrongUsageExitsTwoAndNamesTheFlag) {
  struct Case {
    Args args;
    std::string says;
  };
  const std::vector<Case> cases = {
      {{"generat"}, "no command 'generat'"},
      {{"generate", "--decode=a:1", "--promt=x"}, "did you mean --prompt?"},
      {{"generate", "--decode=a:1", "--prompt=x", "stray"}, "stray argument 'stray'"},
      {{"generate", "--decode=a:1", "--prompt=x", "--prompt=y"}, "--prompt is given twice"},
      {{"generate", "--prompt=x"}, "--decode=ENDPOINT or --model=DIR --local is needed"},
      {{"generate", "--decode=a:1"}, "--prompt=TEXT or --token_ids=1,2,3 is needed"},
      {{"generate", "--decode=a:1", "--prompt=x", "--token_ids=1"}, "both given"},
      {{"generate", "--decode=a:1", "--prompt=x", "--tp=2"}, "--tp goes with --local"},
      {{"generate", "--decode=nowhere", "--prompt=x"}, "write tcp://HOST:PORT"},
      {{"generate", "--local", "--prompt=x"}, "--local needs --model=DIR"},
      {{"generate", "--decode=a:1", "--prompt=x", "--temperature=-1"}, "needs a number from 0"},
      {{"inspect"}, "ENDPOINT is missing"},
      {{"ping", "127.0.0.1"}, "write tcp://HOST:PORT"},
      {{"health", "a:1", "b:2"}, "stray argument 'b:2'"}};
  for (const Case& c : cases) {
    const CliResult result = Cli(c.args);
    EXPECT_EQ(result.exit_code, 2) << c.says;
    EXPECT_THAT(result.err, HasSubstr(c.says));
    EXPECT_THAT(result.out, IsEmpty()) << c.says;
  }
}

TEST_F(CliStory, WithJsonEveryFailureIsOneObjectOnStdout) {
  ExpectJsonError(Cli({"generate", "--json", "--nonsense"}), 2, "kInvalidArgument", false);
  ExpectJsonError(Cli({"ping", kNobody, "--json"}), 3, "kPeerUnreachable", true, kNobody);
  ExpectJsonError(Cli({"health", kNobody, "--json"}), 3, "kPeerUnreachable", true, kNobody);
  ExpectJsonError(Cli({"inspect", kNobody, "--json"}), 3, "kPeerUnreachable", true, kNobody);
  ExpectJsonError(Cli({"generate", std::string("--decode=") + kNobody, "--prompt=x", "--json"}), 3,
                  "kPeerUnreachable", true, kNobody);
  ExpectJsonError(Cli({"generate", "--local", "--model=/nowhere", "--prompt=x", "--json"}), 2,
                  "kNotFound", false);
}

TEST_F(CliStory, ABadModelExitsTwoWithBothNumbers) {
  const CliResult tp =
      Cli({"generate", "--local", "--model=" + BundledModel(), "--tp=3", "--prompt=x"});
  EXPECT_EQ(tp.exit_code, 2);
  EXPECT_THAT(tp.err, HasSubstr("3"));
  EXPECT_THAT(tp.err, HasSubstr("8"));
  const CliResult id =
      Cli({"generate", "--local", "--model=" + BundledModel(), "--token_ids=100000"});
  EXPECT_EQ(id.exit_code, 2);
  EXPECT_THAT(id.err, HasSubstr("100000"));
  const CliResult memory =
      Cli({"generate", "--local", "--model=" + BundledModel(), "--prompt=x", "--kv_blocks=900TiB"});
  EXPECT_EQ(memory.exit_code, 2);
}

TEST_F(CliStory, OneProcessGivesTheSameIdsWhateverItsShape) {
  const Args prompt = {"--system=KING LEAR. Blow, winds, and crack your cheeks!", "--prompt= FOOL.",
                       "--max_new_tokens=24", "--ignore_eos"};
  const std::vector<uint32_t> ids = GenerateLocal(prompt);
  EXPECT_THAT(ids, SizeIs(24));
  for (const std::string shape :
       {"--tp=2", "--pp=4", "--kv_layout=hnd", "--block_size=7", "--prefill_chunk=5",
        "--attn_backend=paged_attn", "--attn_backend=naive_attn"}) {
    Args args = prompt;
    args.push_back(shape);
    EXPECT_EQ(GenerateLocal(args), ids) << shape;
  }
}

TEST_F(CliStory, BackendsTellsWhichAttentionAndWhyNotAnother) {
  const std::string model = "--model=" + BundledModel();
  const CliResult best = Cli({"backends", model});
  ASSERT_EQ(best.exit_code, 0) << best.err;
  EXPECT_THAT(best.out, HasSubstr("relay_attn: chosen, best of 3, fp32 cache"));
  EXPECT_THAT(best.out, HasSubstr("paged_attn: relay_attn was preferred"));
  EXPECT_THAT(best.out, HasSubstr("serves causal, window, soft_cap, alibi"));

  const Json json = Cli({"backends", model, "--relay=off", "--kv_dtype=bf16", "--json"}).json();
  EXPECT_EQ(json["schema"], 1);
  EXPECT_EQ(json["backend"], "paged_attn");
  EXPECT_EQ(json["backends"][0]["why_not"], "serves MLA only");
  EXPECT_EQ(json["backends"][1]["name"], "relay_attn");
  EXPECT_EQ(json["backends"][1]["why_not"], "disabled");
  EXPECT_EQ(json["backends"][2]["chosen"], true);
  EXPECT_EQ(json["backends"][2]["window"], true);

  const std::string window =
      "--model=" + std::string(KVRELAY_SOURCE_DIR) + "/tests/engine/data/tiny-mistral";
  EXPECT_THAT(Cli({"backends", window}).out, HasSubstr("causal, window, "));
  const std::string mla =
      "--model=" + std::string(KVRELAY_SOURCE_DIR) + "/tests/engine/data/tiny-deepseek";
  EXPECT_THAT(Cli({"backends", mla}).out,
              HasSubstr("mla_attn: chosen, best of 4, fp32 cache, causal, mla, "));
  EXPECT_THAT(Cli({"backends", model, "--attn_backend=naive_attn"}).out,
              HasSubstr("naive_attn: chosen, asked for"));
  ExpectJsonError(Cli({"backends", model, "--attn_backend=flash_attn", "--json"}), 2,
                  "kInvalidArgument", false);
  ExpectJsonError(Cli({"backends", model, "--attn_backend=relay_attn", "--relay=off", "--json"}), 2,
                  "kIncompatible", false);
  ExpectJsonError(Cli({"backends", "--model=/nowhere", "--json"}), 2, "kNotFound", false);
}

TEST_F(CliStory, GenerateTellsEverythingThatScriptsRead) {
  const CliResult result = Cli({"generate", "--json", "--local", "--model=" + BundledModel(),
                                "--prompt=And the LORD said", "--max_new_tokens=8", "--ignore_eos",
                                "--request_id=story-1"});
  ASSERT_EQ(result.exit_code, 0) << result.err;
  const Json json = result.json();
  EXPECT_EQ(json["schema"], 1);
  EXPECT_THAT(json["token_ids"], SizeIs(8));
  EXPECT_EQ(json["request_id"], "story-1");
  EXPECT_EQ(json["finish_reason"], "length");
  EXPECT_EQ(json["retries"], 0);
  for (const char* key : {"prefill", "handshake", "pull", "ttft", "total"}) {
    EXPECT_TRUE(json["timing_ms"][key].is_number()) << key;
  }
  EXPECT_EQ(json["kv"]["bytes_pulled"], 0);
  EXPECT_EQ(json["kv"]["prefix_hit"], false);
  EXPECT_EQ(json["kv"]["path"], "local");
}

TEST_F(CliStory, WithoutJsonTheTextIsAllThereIsOnStdout) {
  const Args prompt = {"generate",
                       "--local",
                       "--model=" + BundledModel(),
                       "--prompt=And the LORD said",
                       "--max_new_tokens=8",
                       "--ignore_eos"};
  Args json = prompt;
  json.emplace_back("--json");
  const std::string text = Cli(json).json()["text"];
  EXPECT_EQ(Cli(prompt).out, text + "\n");
}

TEST_F(CliStory, ControlCEndsItWith130) {
#ifdef __SANITIZE_THREAD__
  GTEST_SKIP() << "TSan keeps signals from a thread that waits for a future";
#endif
  RunningCli cli = StartCli({"generate", "--local", "--model=" + BundledModel(), "--prompt=x",
                             "--max_new_tokens=2000", "--ignore_eos"});
  Eventually("text comes", [&cli] { return !cli.out().empty(); });
  cli.Signal(SIGINT);
  const CliResult result = cli.Wait(std::chrono::seconds(10));
  EXPECT_EQ(result.exit_code, 130) << result.err;
  EXPECT_THAT(result.err, HasSubstr("kCancelled"));
}

TEST_F(CliStory, AClosedStdoutKillsNothing) {
  Result<tools::ChildProcess> shell = tools::ChildProcess::Start(
      {.argv = {"/bin/sh", "-c",
                std::string(KVRELAY_BIN_DIR) +
                    "/kvrelay generate --local --model=" + BundledModel() +
                    " --prompt=x --max_new_tokens=20 --ignore_eos 2>&1 >&- ; echo $?"}});
  ASSERT_TRUE(shell) << shell.error().ToString();
  EXPECT_EQ(shell->ReadRest(std::chrono::seconds(30) * Slowness()).value(), "0\n");
}

}  // namespace
}  // namespace kvrelay::integration
