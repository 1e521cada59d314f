// Daemons on one machine that share neither network nor folders nor shared memory, as two
// containers do. Skipped where the system does not allow that.
#include <gmock/gmock.h>

#include "tests/integration/two_hosts.h"

namespace kvrelay::integration {
namespace {

using ::testing::HasSubstr;

using Namespaces = TwoHosts;

TEST_F(Namespaces, WithoutASharedFolderTheKvGoesOverUcxAndInspectSaysWhy) {
  LaunchBy(there().Launcher());
  Daemon& prefill = StartPrefill(There({"--tp=2"}));
  LaunchBy(here().Launcher());  // the client, too: it reaches both from here
  Daemon& decode = StartDecode({&prefill}, Here());
  const uint64_t before = Arrived();
  uint64_t pulled = 0;
  for (const int tokens : {1, 15, 16, 17, 500}) {
    const Args ask = Ask(tokens, 16);
    const CliResult result = RunGenerate(decode, ask);
    ExpectRightAnswer(result, ask);
    const Json kv = result.json()["kv"];
    EXPECT_EQ(kv["path"], "ucx-packed");
    pulled += kv["bytes_pulled"].get<uint64_t>();
  }
  EXPECT_GT(pulled, 1'000'000U);
  EXPECT_GE(Arrived() - before, pulled);
  const Json look = Inspect(decode);
  ASSERT_EQ(look["peers"].size(), 2U) << look["peers"].dump(2);
  for (const Json& peer : look["peers"]) {
    EXPECT_EQ(peer["path"], "ucx-packed");
    EXPECT_THAT(peer["why"].get<std::string>(), HasSubstr("mapped: no shared socket"));
  }
  ExpectIdle(decode);
  ExpectIdle(prefill);
}

// More KV than shared memory: nothing of ours or of UCX's may need it.
TEST_F(Namespaces, SixtyFourMegabytesOfSharedMemorySuffice) {
  for (const std::string transport : {"--transport=mapped", "--transport=ucx-packed"}) {
    LaunchBy(here().Launcher());
    const Args flags = {transport, "--run_dir=/run/kvrelay", "--kv_blocks=2048"};
    Daemon& prefill = StartPrefill(flags);
    Daemon& decode = StartDecode({&prefill}, flags);
    EXPECT_GT(prefill.ready()["kv_bytes"].get<uint64_t>(), uint64_t{64} << 20);
    for (const int tokens : {17, 1500}) {
      const Args ask = Ask(tokens, 16);
      ExpectRightAnswer(RunGenerate(decode, ask), ask);
    }
    ExpectIdle(decode);
    ExpectIdle(prefill);
  }
}

}  // namespace
}  // namespace kvrelay::integration
