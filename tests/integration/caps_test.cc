// --max_bytes_per_s and --max_inflight_bytes, as their operators see them.
#include <string>
#include <vector>

#include "tests/integration/harness.h"

namespace kvrelay::integration {
namespace {

class Caps : public Story, public testing::WithParamInterface<std::string> {
 protected:
  double Counter(const Daemon& daemon, const std::string& name) {
    return Inspect(daemon)["counters"][name].get<double>();
  }
};

// Each byte counts where it is moved: at the reader of mapped memory, at the sender of a stream.
TEST_P(Caps, CountWhatADaemonMovesAndTheTokensAreTheSame) {
  const std::string path = GetParam();
  const Args flags = {"--max_bytes_per_s=4000000", "--max_inflight_bytes=1000",
                      "--transport=" + path};
  const Args prompt = {"--prompt=" + std::string(64, 'x'), "--max_new_tokens=4", "--ignore_eos"};
  Daemon& prefill = StartPrefill(flags);
  Daemon& decode = StartDecode({&prefill}, flags);
  EXPECT_EQ(Generate(decode, prompt), GenerateLocal(prompt));
  const double pulled =
      Counter(decode, "kvrelay_pull_bytes_total{path=\"" + path + "\",kind=\"suffix\"}");
  EXPECT_GT(pulled, 0);
  const Daemon& mover = path == "mapped" ? decode : prefill;
  const Daemon& other = path == "mapped" ? prefill : decode;
  // A sender hears late that its last message was taken.
  Eventually("nothing is in flight",
             [&] { return Counter(mover, "kvrelay_capped_inflight_bytes") == 0; });
  EXPECT_EQ(Counter(mover, "kvrelay_capped_bytes_total"), pulled);
  EXPECT_EQ(Counter(other, "kvrelay_capped_bytes_total"), 0);
}

INSTANTIATE_TEST_SUITE_P(On, Caps, testing::Values("mapped", "ucx-packed"), [](const auto& test) {
  return std::string(test.param == "mapped" ? "Mapped" : "UcxPacked");
});

}  // namespace
}  // namespace kvrelay::integration
