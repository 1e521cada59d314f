// Short forms of the benchmarks: they run, what they move is verified, and what others read from
// their results is there. What they measure here means nothing.
#include <gmock/gmock.h>

#include <fstream>
#include <set>

#include "tests/integration/harness.h"

namespace kvrelay::integration {
namespace {

using ::testing::Contains;
using ::testing::HasSubstr;
using ::testing::IsSupersetOf;

class Bench : public Story {
 protected:
  void SetUp() override {
    if (Slowness() > 1) GTEST_SKIP() << "a benchmark under a sanitizer measures nothing";
  }
  Json Run(Args args) {
    args.insert(args.begin(), "bench");
    args.push_back("--json");
    const CliResult result = Cli(args, std::chrono::seconds(120));
    EXPECT_EQ(result.exit_code, 0) << result.out << result.err;
    return result.exit_code == 0 ? result.json() : Json::object();
  }
  static std::set<std::string> Ways(const Json& rows) {
    std::set<std::string> names;
    for (const Json& row : rows) names.insert(row["way"].get<std::string>());
    return names;
  }
};

TEST_F(Bench, PullVerifiesEveryWayAndEveryPairOfLayouts) {
  // Another system: slow, and never wrong.
  const std::string peer = folder() + "/peer.sh";
  std::ofstream(peer) << "echo ready\n"
                         "while read -r verb rest; do\n"
                         "  case $verb in\n"
                         "    pull) echo 0.125 ;;\n"
                         "    check) echo right ;;\n"
                         "    *) echo ok ;;\n"
                         "  esac\n"
                         "done\n";
  const std::string peers = folder() + "/peers";
  std::ofstream(peers) << "good\tsh " << peer << "\nbad\tsh -c 'echo no such package >&2'\n";
  const Json json = Run({"pull", "--mib=8", "--rounds=2", "--slices=256,65536,1048576",
                         "--threads=1,2", "--peers=" + peers});
  ASSERT_TRUE(json.contains("rows"));
  EXPECT_THAT(Ways(json["rows"]),
              IsSupersetOf({"memcpy", "best copy loop", "process_vm_readv", "mapped", "ucx-packed",
                            "bare UCX GET", "bare UCX stream", "tcp socket", "good"}));
  // As many bytes, but not the slices.
  const std::set<std::string> streams = {"bare UCX stream", "tcp socket"};
  for (const Json& row : json["rows"]) {
    EXPECT_EQ(row.value("verified", false), !streams.contains(row["way"].get<std::string>()))
        << row.dump();
    ASSERT_TRUE(row.contains("gb_per_s")) << row.dump();
    EXPECT_GT(row["gb_per_s"]["min"], 0) << row.dump();
    EXPECT_LE(row["gb_per_s"]["min"], row["gb_per_s"]["max"]) << row.dump();
  }
  EXPECT_TRUE(json["ns_per_slice"].contains("mapped x1")) << json["ns_per_slice"].dump();
  std::set<std::string> layouts;
  for (const Json& row : json["layouts"]) {
    layouts.insert(row["pull"].get<std::string>());
    EXPECT_TRUE(row.value("verified", false)) << row.dump();
    EXPECT_EQ(row["read_bytes"], json["layouts"][0]["read_bytes"]);
    EXPECT_TRUE(row.contains("cost")) << row.dump();
  }
  EXPECT_THAT(layouts, IsSupersetOf({"equal", "TP4 to TP1", "HND to NHD", "bf16 to fp8_e4m3",
                                     "blocks of 16 to 128"}));
  EXPECT_THAT(Ways(json["refused"]), Contains("bad"));
  EXPECT_THAT(json["refused"].dump(), HasSubstr("no such package"));
}

TEST_F(Bench, PullMeasuresOnlyTheWaysThatAreNamed) {
  const Json json = Run({"pull", "--mib=1", "--rounds=1", "--slices=4096", "--threads=1",
                         "--ways=mapped,tcp socket"});
  EXPECT_THAT(Ways(json["rows"]), ::testing::ElementsAre("mapped", "tcp socket"));
  EXPECT_TRUE(json["layouts"].empty());
}

TEST_F(Bench, SmallTimesPullsConnectionsAndLoads) {
  const Json json = Run({"small", "--count=20", "--silences=2", "--silence_ms=20", "--mib=2"});
  ASSERT_TRUE(json.contains("rows"));
  EXPECT_THAT(Ways(json["rows"]), IsSupersetOf({"mapped, copy alone", "mapped, calling thread",
                                                "mapped", "ucx-packed", "memcpy"}));
  for (const Json& row : json["rows"]) {
    ASSERT_TRUE(row.contains("hot")) << row.dump();
    EXPECT_GE(row["hot"]["p99_us"], row["hot"]["p50_us"]);
    EXPECT_EQ(row["cold"]["count"], 2);
  }
  EXPECT_THAT(Ways(json["connects"]), Contains("mapped"));
  const Json& agent = json["agent"];
  EXPECT_GT(agent["load"]["p50_us"], 0);
  EXPECT_GT(agent["first_load_ms"]["min"], 0);
  EXPECT_GT(agent["first_load_curve_ms"]["min"], 0);
}

TEST_F(Bench, ControlPullsEveryLease) {
  const Json json = Run({"control", "--owners=3", "--leases=31", "--pulls=8"});
  EXPECT_EQ(json["leases"], 33);  // all owners offer as many
  for (const char* rate : {"offers_per_s", "handshakes_per_s", "pulls_per_s"}) {
    ASSERT_TRUE(json.contains(rate));
    EXPECT_GT(json[rate], 0) << rate;
  }
  EXPECT_GE(json["pull_p99_ms"], json["pull_p50_ms"]);
}

TEST_F(Bench, WrongNumbersAreRefused) {
  EXPECT_EQ(Cli({"bench"}).exit_code, 2);
  EXPECT_EQ(Cli({"bench", "hay"}).exit_code, 2);
  EXPECT_EQ(Cli({"bench", "pull", "--slices=100"}).exit_code, 2);
  EXPECT_EQ(Cli({"bench", "pull", "--mib=1", "--ways=hay"}).exit_code, 2);
  EXPECT_EQ(Cli({"bench", "control", "--leases=10", "--owners=20"}).exit_code, 2);
  EXPECT_EQ(Cli({"bench", "--help"}).exit_code, 0);
  EXPECT_EQ(Cli({"bench", "pull", "--help"}).exit_code, 0);
}

}  // namespace
}  // namespace kvrelay::integration
