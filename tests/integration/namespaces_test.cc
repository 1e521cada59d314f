// Daemons on one machine that share neither network nor folders nor shared memory, as two
// containers do. Skipped where the system does not allow that.
#include <gmock/gmock.h>

#include "tests/common/isolated_host.h"
#include "tests/integration/failure_story.h"

namespace kvrelay::integration {
namespace {

using ::testing::HasSubstr;

class Namespaces : public FailureStory {
 protected:
  void SetUp() override {
    prefill_host_ = IsolatedHost::Create();
    decode_host_ = IsolatedHost::Create();
    if (!prefill_host_ || !decode_host_ || !prefill_host_->Join(*decode_host_)) {
      GTEST_SKIP() << "no right to make namespaces here, or no ip or nsenter command";
    }
  }

  // At an address that only the cable reaches, with a run folder that only this daemon sees.
  static Args At(const std::string& address, const std::string& interface, Args more = {}) {
    Args flags = {"--listen=tcp://" + address + ":0", "--insecure", "--run_dir=/run/kvrelay",
                  "--data_interface=" + interface, "--trusted_data_network"};
    flags.insert(flags.end(), more.begin(), more.end());
    return flags;
  }

  std::unique_ptr<IsolatedHost> prefill_host_;
  std::unique_ptr<IsolatedHost> decode_host_;
};

TEST_F(Namespaces, WithoutASharedFolderTheKvGoesOverUcxAndInspectSaysWhy) {
  LaunchBy(prefill_host_->Launcher());
  Daemon& prefill = StartPrefill(At("10.213.7.1", "kvtest0", {"--tp=2"}));
  LaunchBy(decode_host_->Launcher());  // the client, too: it reaches both from here
  Daemon& decode = StartDecode({&prefill}, At("10.213.7.2", "kvtest1"));
  const uint64_t before = decode_host_->ReceivedBytes("kvtest1");
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
  EXPECT_GE(decode_host_->ReceivedBytes("kvtest1") - before, pulled);
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
    LaunchBy(decode_host_->Launcher());
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
