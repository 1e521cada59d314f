// Daemons as their operators see them: ready line, questions, refusals, draining.
#include <gmock/gmock.h>

#include <algorithm>
#include <csignal>
#include <filesystem>
#include <fstream>

#include "tests/integration/harness.h"

namespace kvrelay::integration {
namespace {

using ::testing::HasSubstr;
using ::testing::IsEmpty;
using ::testing::Not;
using ::testing::SizeIs;

using namespace std::chrono_literals;

class DaemonStory : public Story {
 protected:
  static constexpr const char* kNobody = "tcp://127.0.0.1:1";

  static Args Prompt(const Daemon& decode, Args more = {}) {
    Args args = {"generate",
                 "--json",
                 "--decode=" + decode.endpoint(),
                 "--prompt=And the LORD said",
                 "--ignore_eos",
                 "--max_new_tokens=16"};
    args.insert(args.end(), more.begin(), more.end());
    return args;
  }

  CliResult RunPrefill(const Args& flags) {
    Args args = {"--role=prefill", "--model=" + BundledModel(), "--run_dir=" + run_dir()};
    args.insert(args.end(), flags.begin(), flags.end());
    return RunDaemon(args);
  }

  int Health(const Daemon& daemon, const Args& flags = {}) {
    Args args = {"health", daemon.endpoint()};
    args.insert(args.end(), flags.begin(), flags.end());
    return Cli(args).exit_code;
  }
};

TEST_F(DaemonStory, TwoDaemonsSayWhatOneProcessSays) {
  Daemon& prefill = StartPrefill({"--tp=2"});
  Daemon& decode = StartDecode({&prefill});
  const Args prompt = {"--system=KING LEAR. Blow, winds, and crack your cheeks!", "--prompt= FOOL.",
                       "--max_new_tokens=32", "--ignore_eos"};
  EXPECT_EQ(Generate(decode, prompt), GenerateLocal(prompt));
  ExpectIdle(decode);
  ExpectIdle(prefill);
}

TEST_F(DaemonStory, TheReadyLineTellsWhatAScriptNeeds) {
  Daemon& prefill =
      StartPrefill({"--tp=2", "--pp=3", "--kv_blocks=8MiB", "--engine_id=" + std::string(32, 'a')});
  const Json& ready = prefill.ready();
  EXPECT_EQ(ready["schema"], 1);
  EXPECT_EQ(ready["ready"], true);
  EXPECT_EQ(ready["role"], "prefill");
  EXPECT_EQ(ready["tp"], 2);
  EXPECT_EQ(ready["pp"], 3);
  EXPECT_EQ(ready["pid"], prefill.pid());
  EXPECT_EQ(ready["engine_id"], std::string(32, 'a'));
  EXPECT_LE(ready["kv_bytes"], 8 << 20);
  EXPECT_GT(ready["kv_blocks"], 0);
  EXPECT_THAT(ready["model_fingerprint"].get<std::string>(), SizeIs(32));
  EXPECT_FALSE(ready.contains("prefill"));

  Daemon& decode = StartDecode({&prefill});
  EXPECT_EQ(decode.ready()["model_fingerprint"], ready["model_fingerprint"]);
  EXPECT_EQ(decode.ready()["prefill"],
            Json::array({{{"endpoint", prefill.endpoint()}, {"state", "ready"}}}));
}

TEST_F(DaemonStory, InspectShowsWhatHappened) {
  Daemon& prefill = StartPrefill({"--tp=2", "--kv_layout=hnd"});
  Daemon& decode = StartDecode({&prefill}, {"--relay=off"});
  Generate(decode, {"--system=" + std::string(40, 's'), "--prompt=x", "--max_new_tokens=2"});

  const Json of_decode = Inspect(decode);
  EXPECT_EQ(of_decode["schema"], 1);
  EXPECT_EQ(of_decode["engine"]["role"], "decode");
  EXPECT_THAT(of_decode["prefixes"], SizeIs(1));
  EXPECT_EQ(of_decode["prefixes"][0]["tokens"], 32);
  EXPECT_THAT(of_decode["peers"], SizeIs(2)) << "both prefill ranks";
  EXPECT_EQ(of_decode["peers"][0]["path"], "mapped");
  EXPECT_THAT(of_decode["peers"][0]["why"].get<std::string>(), Not(IsEmpty()));
  EXPECT_EQ(of_decode["prefill_workers"][0]["state"], "ready");
  EXPECT_EQ(of_decode["counters"]["kvrelay_pulls_total{path=\"mapped\",outcome=\"ok\"}"], 2);
  bool relay_is_off = false;
  for (const Json& flag : of_decode["flags"]) {
    relay_is_off |= flag["name"] == "relay" && flag["value"] == "off" && flag["source"] == "flag";
  }
  EXPECT_TRUE(relay_is_off);

  const Json of_prefill = Inspect(prefill);
  EXPECT_EQ(of_prefill["layout"]["format"], "hnd");
  EXPECT_THAT(of_prefill["shards"], SizeIs(2));
  EXPECT_EQ(of_prefill["regions"][0]["exported"], "memfd");
  EXPECT_THAT(Cli({"inspect", prefill.endpoint()}).out, HasSubstr("prefill engine"));
}

TEST_F(DaemonStory, WatchingLooksAgainEverySecondUntilControlC) {
  Daemon& prefill = StartPrefill();
  RunningCli cli = StartCli({"inspect", prefill.endpoint(), "--json", "--watch"});
  Eventually("a second look", [&cli] {
    const std::string out = cli.out();
    return std::count(out.begin(), out.end(), '\n') >= 2;
  });
  cli.Signal(SIGINT);
  EXPECT_EQ(cli.Wait(5s).exit_code, 130);
}

TEST_F(DaemonStory, PingMeasuresHandshakeAndRoundTrips) {
  Daemon& prefill = StartPrefill();
  const Json json = Cli({"ping", prefill.endpoint(), "--count=20", "--json"}).json();
  EXPECT_EQ(json["engine_id"], prefill.ready()["engine_id"]);
  EXPECT_EQ(json["count"], 20);
  EXPECT_GT(json["handshake_ms"], 0);
  EXPECT_LE(json["rtt_p50_ms"], json["rtt_p99_ms"]);
}

TEST_F(DaemonStory, DecodeIsReadyWithoutPrefillAndRecovers) {
  Daemon& first = StartPrefill();
  const std::string address = first.endpoint();
  first.Kill();
  Daemon& decode = StartDecode({}, {"--prefill=" + address});
  EXPECT_EQ(decode.ready()["prefill"][0]["state"], "unreachable");
  EXPECT_EQ(Health(decode), 5);
  EXPECT_EQ(Health(decode, {"--live"}), 0);
  EXPECT_EQ(Health(first), 3);

  StartPrefill({"--listen=" + address});
  Eventually("decode finds the prefill daemon", [&] { return Health(decode) == 0; });
  EXPECT_THAT(Generate(decode, {"--prompt=x", "--max_new_tokens=4", "--ignore_eos"}), SizeIs(4));
}

TEST_F(DaemonStory, AnIdleDaemonStopsAtTheFirstSignal) {
  Daemon& prefill = StartPrefill();
  prefill.Terminate();
  EXPECT_EQ(prefill.WaitForExit(3s).ToString(), "exit code 0");
  EXPECT_THAT(prefill.log(), HasSubstr("stopped; 0 requests and leases were cut off"));
}

TEST_F(DaemonStory, DrainingFinishesOpenStreamsAndRefusesNewOnes) {
  Daemon& prefill = StartPrefill();
  Daemon& decode = StartDecode({&prefill}, {"--drain_timeout_ms=60000"});
  RunningCli open = StartCli({"generate", "--decode=" + decode.endpoint(), "--prompt=And",
                              "--ignore_eos", "--max_new_tokens=400"});
  Eventually("text comes", [&open] { return !open.out().empty(); });
  decode.Interrupt();
  Eventually("decode drains", [&] { return Health(decode) == 5; });
  const CliResult refused = Cli(Prompt(decode));
  EXPECT_EQ(refused.exit_code, 5);
  EXPECT_EQ(refused.json()["error"]["code"], "kDraining");
  EXPECT_EQ(refused.json()["error"]["retryable"], true);
  EXPECT_EQ(open.Wait().exit_code, 0);
  EXPECT_EQ(decode.WaitForExit(60s).ToString(), "exit code 0");
}

TEST_F(DaemonStory, ADrainThatTakesTooLongCutsTheRest) {
  Daemon& prefill = StartPrefill();
  Daemon& decode = StartDecode({&prefill}, {"--drain_timeout_ms=100"});
  RunningCli open = StartCli({"generate", "--decode=" + decode.endpoint(), "--prompt=And",
                              "--ignore_eos", "--max_new_tokens=2000"});
  Eventually("text comes", [&open] { return !open.out().empty(); });
  decode.Terminate();
  EXPECT_EQ(open.Wait(10s).exit_code, 5);
  EXPECT_EQ(decode.WaitForExit(10s).ToString(), "exit code 0");
  EXPECT_THAT(decode.log(), HasSubstr("stopped; 1 requests and leases were cut off"));
}

TEST_F(DaemonStory, TheSecondSignalEndsItAtOnce) {
  Daemon& prefill = StartPrefill();
  Daemon& decode = StartDecode({&prefill});
  RunningCli open = StartCli({"generate", "--decode=" + decode.endpoint(), "--prompt=And",
                              "--ignore_eos", "--max_new_tokens=2000"});
  Eventually("text comes", [&open] { return !open.out().empty(); });
  decode.Terminate();
  Eventually("decode drains", [&] { return Health(decode) == 5; });
  decode.Terminate();
  EXPECT_EQ(decode.WaitForExit(2s).ToString(), "exit code 1");
  EXPECT_EQ(open.Wait(20s).exit_code, 3);
}

TEST_F(DaemonStory, ControlCCancelsTheRequestOnBothDaemons) {
  Daemon& prefill = StartPrefill();
  Daemon& decode = StartDecode({&prefill});
  RunningCli cli = StartCli({"generate", "--decode=" + decode.endpoint(), "--prompt=And",
                             "--ignore_eos", "--max_new_tokens=2000"});
  Eventually("text comes", [&cli] { return !cli.out().empty(); });
  cli.Signal(SIGINT);
  EXPECT_EQ(cli.Wait(5s).exit_code, 130);
  ExpectIdle(decode);
  ExpectIdle(prefill);
}

TEST_F(DaemonStory, BadConfigurationExitsTwoAndSaysWhy) {
  Daemon& taken = StartPrefill();
  struct Case {
    Args flags;
    std::string says;
  };
  const std::vector<Case> cases = {
      {{"--listen=" + taken.endpoint()}, "port taken"},
      {{"--listen=tcp://0.0.0.0:0", "--insecure"}, "--advertise"},
      {{"--listen=tcp://0.0.0.0:0", "--advertise=tcp://127.0.0.1:0"}, "--insecure"},
      {{"--data_interface=eth0"}, "--trusted_data_network"},
      {{"--prefill=tcp://127.0.0.1:7"}, "--role=decode"},
      {{"--tp=3"}, "3"},
      {{"--kv_blocks=900TiB"}, "available"},
      {{"--host_id=no spaces"}, "--host_id=no spaces"},
      {{"--engine_id=xyz"}, "32 hexadecimal digits"},
      {{"--transport=carrier-pigeon"}, "auto|mapped|ucx-get|ucx-packed|zmq-packed"},
      {{"--tp=1", "--tp=2"}, "given twice"},
      {{"stray"}, "stray argument"}};
  for (const Case& c : cases) {
    const CliResult result = RunPrefill(c.flags);
    EXPECT_EQ(result.exit_code, 2) << c.says << result.err;
    EXPECT_THAT(result.err, HasSubstr(c.says));
    EXPECT_THAT(result.out, IsEmpty()) << "no ready line";
  }
  EXPECT_EQ(RunDaemon({"--role=prefill"}).exit_code, 2);
  EXPECT_EQ(RunDaemon({"--role=prefill", "--model=/nowhere"}).exit_code, 2);
  EXPECT_EQ(RunDaemon({"--role=decode", "--model=" + BundledModel()}).exit_code, 2);
  EXPECT_EQ(RunDaemon({"--help"}).exit_code, 0);
}

TEST_F(DaemonStory, ModelsThatDifferAreRefusedWithBothFingerprints) {
  const std::string other = folder() + "/other";
  std::filesystem::copy(BundledModel(), other);
  std::fstream weights(other + "/model.safetensors",
                       std::ios::in | std::ios::out | std::ios::binary);
  weights.seekp(-1, std::ios::end);
  weights.put('\x3c');
  weights.close();
  Daemon& prefill = StartPrefill({"--model=" + other});
  Daemon& decode = StartDecode({&prefill});
  EXPECT_EQ(decode.ready()["prefill"][0]["state"], "incompatible");
  const CliResult result = Cli(Prompt(decode));
  EXPECT_EQ(result.exit_code, 4) << result.out;
  const std::string message = result.json()["error"]["message"];
  EXPECT_THAT(message, HasSubstr(prefill.ready()["model_fingerprint"].get<std::string>()));
  EXPECT_THAT(message, HasSubstr(decode.ready()["model_fingerprint"].get<std::string>()));
}

TEST_F(DaemonStory, RequestsThatCanNeverRunAreRefusedAtOnce) {
  Daemon& prefill = StartPrefill();
  Daemon& decode = StartDecode({&prefill}, {"--kv_blocks=4"});
  const CliResult large = Cli(Prompt(decode, {"--system=" + std::string(100, 's')}));
  EXPECT_EQ(large.exit_code, 2);
  EXPECT_EQ(large.json()["error"]["code"], "kTooLarge");
  const CliResult foreign =
      Cli({"generate", "--json", "--decode=" + decode.endpoint(), "--token_ids=100000"});
  EXPECT_EQ(foreign.exit_code, 2);
  EXPECT_THAT(foreign.json()["error"]["message"].get<std::string>(), HasSubstr("100000"));
}

TEST_F(DaemonStory, NobodyToPrefillIsAnErrorWithinItsTime) {
  Daemon& decode = StartDecode({}, {std::string("--prefill=") + kNobody});
  const CliResult result = Cli(Prompt(decode, {"--timeout_ms=3000"}));
  EXPECT_EQ(result.exit_code, 3) << result.out;
  EXPECT_LT(result.ms, 4000 * Slowness());
}

TEST_F(DaemonStory, ADemoThatCannotStartRepeatsTheDaemonsWords) {
  const CliResult demo = Cli({"demo", "--model=/nowhere"});
  EXPECT_EQ(demo.exit_code, 2);
  EXPECT_THAT(demo.err, HasSubstr("the prefill daemon did not become ready (exit code 2)"));
  EXPECT_THAT(demo.err, HasSubstr("/nowhere"));
}

TEST_F(DaemonStory, TheDemoProvesThatNothingChangedAndLeavesNothingBehind) {
  const CliResult demo =
      Cli({"demo", "--json", "--model=" + BundledModel(), "--max_new_tokens=24"}, 120s);
  ASSERT_EQ(demo.exit_code, 0) << demo.out << demo.err;
  const Json json = demo.json();
  EXPECT_EQ(json["identical"], true);
  EXPECT_EQ(json["identical_tokens"], 4 * 24);
  ASSERT_THAT(json["requests"], SizeIs(4));
  uint64_t prefix_pulls = 0;
  for (const Json& request : json["requests"]) {
    prefix_pulls += request["kv"]["prefix_bytes_pulled"] > 0 ? 1 : 0;
  }
  EXPECT_EQ(prefix_pulls, 1U) << "the shared system prompt crosses once";
  for (const char* daemon : {"prefill", "decode"}) {
    EXPECT_NE(::kill(json[daemon]["pid"].get<pid_t>(), 0), 0) << daemon;
  }
  EXPECT_THAT(demo.err, IsEmpty());
}

}  // namespace
}  // namespace kvrelay::integration
