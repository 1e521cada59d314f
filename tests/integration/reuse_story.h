// What the stories about conversations share: daemons with --reuse_from_decode, and turns whose
// answers are compared with those of one process.
#pragma once

#include <gtest/gtest.h>

#include "tests/integration/direct.h"
#include "tests/integration/failure_story.h"
#include "tests/integration/generator.h"

namespace kvrelay::integration {

// The answers to a PREFILL that is done.
struct Prefilled {
  proto::Ticket ticket;
  proto::PrefillReply last;
};

class ReuseStory : public FailureStory {
 protected:
  static constexpr uint64_t kTokenBytes = 6 * 2 * 4 * 32 * 4;  // layers, K and V, heads, dim, fp32
  static constexpr uint32_t kAnswer = 24;
  // A conversation of which the last answer is the daemon's.
  struct Talk {
    std::vector<uint32_t> system;
    std::vector<uint32_t> history = Text(100, 3);

    proto::Generate Turn() const { return Greedy(system, history, kAnswer); }
    size_t tokens() const { return system.size() + history.size(); }
    void Continue(const std::vector<uint32_t>& answer, size_t salt) {
      history.insert(history.end(), answer.begin(), answer.end());
      const std::vector<uint32_t> more = Text(11, salt);
      history.insert(history.end(), more.begin(), more.end());
    }
  };

  // The daemons' flags besides --reuse_from_decode.
  void Begin(Args prefill_flags = {}, Args decode_flags = {}) {
    prefill_flags.emplace_back("--reuse_from_decode");
    decode_flags.emplace_back("--reuse_from_decode");
    prefill = &StartPrefill(std::move(prefill_flags));
    decode = &StartDecode({prefill}, std::move(decode_flags));
  }

  // Asks, compares with one process, and goes on with the answer. What the summary says.
  Json Ask(Talk& talk, size_t turn);
  static void ExpectComputesAll(const Json& summary, const Talk& before) {
    EXPECT_EQ(summary["kv"]["reused_tokens"], 0);
    EXPECT_EQ(summary["kv"]["reuse_bytes"], 0);
    EXPECT_EQ(summary["kv"]["computed_tokens"], before.tokens());
  }
  uint64_t Kept() { return Look(*decode)["blocks"]["kept"].get<uint64_t>(); }
  void ExpectNothingLeft() {
    ExpectIdle(*prefill);
    ExpectIdle(*decode);
  }

  // Asks the prefill daemon as a decode engine that offers this.
  Result<Prefilled> Prefill(const std::vector<uint32_t>& prompt, std::vector<proto::Reuse> offers);
  // The tokens that it computes then.
  uint32_t Computes(const std::vector<uint32_t>& prompt, const proto::Reuse& offer);
  // Of the `n` first tokens of `prompt`, by the engine behind `front`.
  static proto::Reuse OfferOf(const DirectReader& owner, const std::string& front,
                              const std::vector<uint32_t>& prompt, uint32_t n);

  Daemon* prefill = nullptr;
  Daemon* decode = nullptr;

 private:
  Reference reference_{BundledModel()};
};

}  // namespace kvrelay::integration
