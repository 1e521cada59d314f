// Daemons with keys: everybody who belongs to them is served as without, and nobody else.
#include <gmock/gmock.h>
#include <ifaddrs.h>
#include <net/if.h>
#include <netdb.h>
#include <netinet/in.h>

#include <chrono>
#include <fstream>
#include <map>
#include <string>
#include <vector>

#include "tests/integration/harness.h"

namespace kvrelay::integration {
namespace {

using namespace std::chrono_literals;
using ::testing::Contains;
using ::testing::EndsWith;
using ::testing::HasSubstr;

const Args kPrompt = {"--system=The book of Psalms", "--prompt=Psalms 151 1 O God",
                      "--max_new_tokens=24", "--ignore_eos"};

// An interface with an address in IPv4 beside loopback; empty: there is none.
std::string OtherInterface() {
  ifaddrs* all = nullptr;
  if (getifaddrs(&all) != 0) return "";
  std::string name;
  for (const ifaddrs* at = all; at != nullptr; at = at->ifa_next) {
    if (at->ifa_addr == nullptr || at->ifa_addr->sa_family != AF_INET) continue;
    if ((at->ifa_flags & IFF_RUNNING) != 0 && (at->ifa_flags & IFF_LOOPBACK) == 0)
      name = at->ifa_name;
  }
  freeifaddrs(all);
  return name;
}

// A name for this host where it has one: a bare system may know none.
std::string LocalHost() {
  addrinfo* found = nullptr;
  if (getaddrinfo("localhost", nullptr, nullptr, &found) != 0) return "127.0.0.1";
  freeaddrinfo(found);
  return "localhost";
}

class KeysStory : public Story {
 protected:
  KeysStory() {
    for (const std::string name : {"prefill", "decode", "user", "stranger"}) {
      const CliResult made = Cli({"keygen", KeyFile(name), "--json"});
      EXPECT_EQ(made.exit_code, 0) << made.err;
      public_[name] = made.json()["public_key"];
    }
    std::ofstream allowed(folder() + "/allowed");
    for (const std::string name : {"prefill", "decode", "user"}) {
      allowed << public_[name] << " " << name << "\n";
    }
  }

  std::string KeyFile(const std::string& name) const { return folder() + "/" + name + ".key"; }
  Args Keys(const std::string& name, Args more = {}) const {
    more.push_back("--key_file=" + KeyFile(name));
    more.push_back("--allowed_keys=" + folder() + "/allowed");
    return more;
  }
  // From now on commands have the user's key.
  void BeTheUser() { LaunchBy({"/usr/bin/env", "KVRELAY_KEY_FILE=" + KeyFile("user")}); }
  // A ping that is refused, in bounded time; its message.
  std::string PingError(const std::string& endpoint, const Args& flags, int exit_code) {
    Args args = {"ping", endpoint, "--json", "--timeout_ms=30000"};
    args.insert(args.end(), flags.begin(), flags.end());
    const CliResult result = Cli(args);
    EXPECT_EQ(result.exit_code, exit_code) << result.out << result.err;
    EXPECT_LT(result.ms, 10'000 * Slowness());
    const Json json = result.json();
    return json.is_object() && json.contains("error") ? json["error"]["message"] : Json("");
  }
  void ExpectSameTokens(const Daemon& decode, const std::string& path) {
    Args args = {"generate", "--json", "--decode=" + decode.endpoint()};
    args.insert(args.end(), kPrompt.begin(), kPrompt.end());
    const CliResult result = Cli(args);
    ASSERT_EQ(result.exit_code, 0) << result.out << result.err;
    const Json json = result.json();
    EXPECT_EQ(json["kv"]["path"], path);
    EXPECT_EQ(json["token_ids"].get<std::vector<uint32_t>>(), GenerateLocal(kPrompt));
  }

  std::map<std::string, std::string> public_;
};

TEST_F(KeysStory, TokensAreThoseOfOneProcess) {
  Daemon& prefill =
      StartPrefill(Keys("prefill", {"--tp=2", "--advertise=tcp://" + LocalHost() + ":0"}));
  Daemon& decode = StartDecode({&prefill}, Keys("decode"));
  ASSERT_TRUE(prefill.started() && decode.started());
  EXPECT_THAT(prefill.endpoint(), EndsWith("#" + public_["prefill"]));
  EXPECT_EQ(decode.ready()["prefill"][0]["state"], "ready");
  BeTheUser();
  ExpectSameTokens(decode, "mapped");
  EXPECT_EQ(Cli({"health", decode.endpoint()}).exit_code, 0);
  EXPECT_EQ(Cli({"ping", prefill.endpoint(), "--count=3"}).exit_code, 0);
  const Json inspected = Inspect(decode);
  for (const Json& peer : inspected["peers"]) {
    EXPECT_THAT(peer["endpoint"].get<std::string>(), EndsWith("#" + public_["prefill"]))
        << "every rank";
  }
  ExpectIdle(decode);
  ExpectIdle(prefill);
}

TEST_F(KeysStory, AConversationIsTakenBackFromADecodeDaemonWithAKey) {
  Daemon& prefill = StartPrefill(Keys("prefill", {"--reuse_from_decode"}));
  Daemon& decode = StartDecode({&prefill}, Keys("decode", {"--reuse_from_decode"}));
  ASSERT_TRUE(prefill.started() && decode.started());
  BeTheUser();
  for (int turn = 0; turn < 2; ++turn) ExpectSameTokens(decode, "mapped");
  const Json inspected = Inspect(prefill);
  EXPECT_EQ(inspected["counters"]["kvrelay_reuse_total{outcome=\"ok\"}"], 1);
  ASSERT_EQ(inspected["peers"].size(), 1U);
  EXPECT_THAT(inspected["peers"][0]["endpoint"].get<std::string>(),
              EndsWith("#" + public_["decode"]));
  ExpectIdle(decode);
  ExpectIdle(prefill);
}

TEST_F(KeysStory, WhoDoesNotBelongIsRefusedAndTheDaemonGoesOn) {
  Daemon& prefill = StartPrefill(Keys("prefill"));
  ASSERT_TRUE(prefill.started());
  const std::string keyed = prefill.endpoint();
  const std::string plain = keyed.substr(0, keyed.find('#'));
  const Args user = {"--key_file=" + KeyFile("user")};
  EXPECT_THAT(PingError(plain, {}, 3), HasSubstr("does it ask for keys"));
  EXPECT_THAT(PingError(keyed, {}, 2), HasSubstr("asks for keys: --key_file=FILE"));
  EXPECT_THAT(PingError(plain, user, 2), HasSubstr("names no key"));
  EXPECT_THAT(PingError(keyed, {"--key_file=" + KeyFile("stranger")}, 4),
              HasSubstr("does not allow our key " + public_["stranger"]));
  EXPECT_THAT(PingError(plain + "#" + public_["decode"], user, 4),
              HasSubstr("does not have that key"));
  EXPECT_THAT(prefill.log(), HasSubstr("its key " + public_["stranger"] + " is not allowed"));
  EXPECT_EQ(Cli({"ping", keyed, "--count=1", user[0]}).exit_code, 0);

  Daemon& stranger = StartDecode({&prefill}, {"--key_file=" + KeyFile("stranger")});
  EXPECT_EQ(stranger.ready()["prefill"][0]["state"], "unreachable");
  const CliResult result = Cli({"generate", "--json", "--decode=" + stranger.endpoint(),
                                "--prompt=x", "--key_file=" + KeyFile("stranger")});
  EXPECT_EQ(result.exit_code, 4) << result.out;
  EXPECT_THAT(result.json()["error"]["message"].get<std::string>(),
              HasSubstr("does not allow our key"));
}

TEST_F(KeysStory, AnUntrustedDataNetworkIsUsedWithKeysOnly) {
  const std::string interface = OtherInterface();
  if (interface.empty()) GTEST_SKIP() << "this host has no network beside loopback";
  const std::string flag = "--data_interface=" + interface;
  Daemon& prefill = StartPrefill(Keys("prefill", {flag, "--host_id=a"}));
  Daemon& decode = StartDecode({&prefill}, Keys("decode", {flag, "--host_id=b"}));
  ASSERT_TRUE(prefill.started() && decode.started());
  BeTheUser();
  EXPECT_THAT(Inspect(decode)["transports"],
              Contains("no ucx-packed: the data network " + interface + " is not trusted"));
  ExpectSameTokens(decode, "zmq-packed");
}

TEST_F(KeysStory, BadKeysExitTwoAndSayWhy) {
  const std::string keys = "--key_file=" + KeyFile("prefill");
  const std::string list = folder() + "/list";
  std::ofstream(list) << public_["user"] << "\nnode7\n";
  struct Case {
    Args flags;
    std::string says;
    std::string role = "prefill";
  };
  const std::vector<Case> cases = {
      {{"--allowed_keys=" + list}, "--allowed_keys goes with --key_file"},
      {{"--key_file=/nowhere"}, "/nowhere: No such file or directory"},
      {{"--key_file=" + list}, "chmod 600"},
      {{keys, "--allowed_keys=" + list}, list + ":2: 'node7' is not a public key"},
      {{keys, "--listen=tcp://127.0.0.1:0#" + public_["user"]}, "--listen takes no #KEY"},
      {{"--data_interface=eth0"}, "--key_file=FILE"},
      {{keys, "--data_interface=eth0", "--transport=ucx-packed"}, "--trusted_data_network"},
      {{keys, "--prefill=tcp://127.0.0.1:7"}, "names no key", "decode"},
      {{"--prefill=tcp://127.0.0.1:7#" + public_["user"]}, "asks for keys", "decode"},
      {{keys, "--allowed_keys=" + folder() + "/allowed",
        "--prefill=tcp://127.0.0.1:7#" + public_["stranger"]},
       "is not there",
       "decode"}};
  for (const Case& c : cases) {
    Args args = c.flags;
    args.push_back("--model=" + BundledModel());
    args.push_back("--role=" + c.role);
    const CliResult result = RunDaemon(args);
    EXPECT_EQ(result.exit_code, 2) << c.says << result.err;
    EXPECT_THAT(result.err, HasSubstr(c.says));
  }
}

TEST_F(KeysStory, KeygenOverwritesNothing) {
  const CliResult again = Cli({"keygen", KeyFile("user")});
  EXPECT_EQ(again.exit_code, 2);
  EXPECT_THAT(again.err, HasSubstr("is there already"));
  const CliResult made = Cli({"keygen", folder() + "/new.key"});
  EXPECT_EQ(made.exit_code, 0);
  EXPECT_EQ(made.out.size(), 44U) << made.out;
}

}  // namespace
}  // namespace kvrelay::integration
