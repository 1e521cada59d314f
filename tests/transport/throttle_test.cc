#include "transport/throttle.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cstdlib>
#include <deque>
#include <memory>
#include <optional>
#include <random>
#include <string>
#include <vector>

#include "tests/transport/node.h"

namespace kvrelay::transport {
namespace {

using std::chrono::microseconds;
using std::chrono::seconds;

TimePoint At(int64_t us) { return TimePoint{} + microseconds(us); }

constexpr Priority kDecode = Priority::kDecode;
constexpr Priority kPrefetch = Priority::kPrefetch;

TEST(Throttle, BoundsNothingWithoutCaps) {
  Gate gate(nullptr);
  EXPECT_TRUE(gate.Begin(kPrefetch, UINT64_MAX, At(0)));
  EXPECT_EQ(gate.PieceBytes(123), 123U);
  EXPECT_EQ(gate.retry_at(At(0)), TimePoint::max());
}

TEST(Throttle, APieceLargerThanWhatMayBeInFlightGoesAlone) {
  const auto throttle = std::make_shared<Throttle>(Caps{.inflight_bytes = 100});
  Gate one(throttle);
  Gate other(throttle);
  ASSERT_TRUE(one.Begin(kDecode, 40, At(0)));
  EXPECT_FALSE(other.Begin(kDecode, 1000, At(0)));
  one.End(40, 40);
  EXPECT_TRUE(other.Begin(kDecode, 1000, other.retry_at(At(0))));
  EXPECT_FALSE(other.Begin(kDecode, 1, At(1000)));
  other.End(500, 0);
  EXPECT_FALSE(other.Begin(kDecode, 1, At(1000))) << "500 are in flight, more than the cap";
  other.End(500, 0);
  EXPECT_TRUE(other.Begin(kDecode, 1000, At(1000))) << "room is seen at once by who made it";
  EXPECT_EQ(throttle->counts().inflight_bytes, 1000U);
  EXPECT_EQ(throttle->counts().moved_bytes, 40U);
  EXPECT_EQ(throttle->counts().waits, 2U);
}

TEST(Throttle, WhatWasNotMovedIsNotCounted) {
  const auto throttle = std::make_shared<Throttle>(Caps{.bytes_per_s = 1'000'000});
  Gate gate(throttle);
  ASSERT_TRUE(gate.Begin(kDecode, 1'000'000, At(0)));
  gate.End(1'000'000, 10);
  // 10 bytes are 10 us; a million would have been a second.
  EXPECT_FALSE(gate.Begin(kDecode, 1, At(0)));
  EXPECT_EQ(gate.retry_at(At(0)), At(10));
  EXPECT_TRUE(gate.Begin(kDecode, 1, At(10)));
}

TEST(Throttle, TheUrgentGoFirstThenWhoWaitedLonger) {
  const auto throttle = std::make_shared<Throttle>(Caps{.bytes_per_s = 1'000'000});
  Gate first(throttle);
  Gate second(throttle);
  Gate urgent(throttle);
  ASSERT_TRUE(first.Begin(kPrefetch, 1000, At(0)));  // a millisecond
  EXPECT_FALSE(first.Begin(kPrefetch, 1000, At(0)));
  EXPECT_FALSE(second.Begin(kPrefetch, 1000, At(1)));
  EXPECT_FALSE(urgent.Begin(kDecode, 1000, At(2)));
  // It is earned, and whoever comes first is not the one.
  EXPECT_FALSE(second.Begin(kPrefetch, 1000, At(1001)));
  EXPECT_FALSE(first.Begin(kPrefetch, 1000, At(1002)));
  EXPECT_TRUE(urgent.Begin(kDecode, 1000, At(1003)));
  EXPECT_FALSE(second.Begin(kPrefetch, 1000, At(2100)));
  EXPECT_TRUE(first.Begin(kPrefetch, 1000, At(2101)));
  EXPECT_TRUE(second.Begin(kPrefetch, 1000, At(3200)));
}

TEST(Throttle, WhoDoesNotAskAgainLosesItsPlace) {
  const auto throttle = std::make_shared<Throttle>(Caps{.bytes_per_s = 1'000'000});
  Gate gone(throttle);
  Gate here(throttle);
  ASSERT_TRUE(here.Begin(kPrefetch, 1000, At(0)));
  EXPECT_FALSE(gone.Begin(kDecode, 1000, At(1)));  // cancelled meanwhile
  EXPECT_FALSE(here.Begin(kPrefetch, 1000, At(1100)));
  EXPECT_TRUE(here.Begin(kPrefetch, 1000, At(3100)));
}

// Gates that begin and end pieces as it comes, on a clock of the test's.
TEST(Throttle, RandomPiecesKeepToBothCaps) {
  const char* const given = std::getenv("KVRELAY_SEED");
  const uint64_t seed =
      given != nullptr ? std::strtoull(given, nullptr, 10) : std::random_device{}();
  SCOPED_TRACE("KVRELAY_SEED=" + std::to_string(seed));
  std::mt19937_64 random(seed);
  const auto below = [&](uint64_t n) { return random() % n; };

  for (int round = 0; round < 100; ++round) {
    const Caps caps{.bytes_per_s = below(4) == 0 ? 0 : 100'000 + below(10'000'000),
                    .inflight_bytes = below(4) == 0 ? 0 : 4096 + below(20'000)};
    const auto throttle = std::make_shared<Throttle>(caps);
    struct Side {
      std::unique_ptr<Gate> gate;
      std::deque<std::pair<uint64_t, int64_t>> in_flight;  // bytes, until when (us)
      Priority priority = kDecode;
    };
    std::vector<Side> sides(1 + below(4));
    for (Side& side : sides) {
      side.gate = std::make_unique<Gate>(throttle);
      side.priority = below(2) == 0 ? kDecode : kPrefetch;
    }
    constexpr uint64_t kPiece = 4096;
    uint64_t moved = 0;
    uint64_t in_flight = 0;
    double least = 0;  // of what was moved less what the rate allows, so far
    int64_t us = 0;
    for (int step = 0; step < 2000; ++step) {
      us += static_cast<int64_t>(below(400));
      for (Side& side : sides) {
        while (!side.in_flight.empty() && side.in_flight.front().second <= us) {
          side.gate->End(side.in_flight.front().first, side.in_flight.front().first);
          in_flight -= side.in_flight.front().first;
          side.in_flight.pop_front();
        }
      }
      Side& side = sides[below(sides.size())];
      const uint64_t bytes = 1 + below(kPiece);
      const double over = static_cast<double>(moved) -
                          static_cast<double>(caps.bytes_per_s) * static_cast<double>(us) / 1e6;
      least = std::min(least, over);
      if (!side.gate->Begin(side.priority, bytes, At(us))) {
        ASSERT_GT(side.gate->retry_at(At(us)), At(us));
        continue;
      }
      side.in_flight.emplace_back(bytes, us + static_cast<int64_t>(below(3000)));
      moved += bytes;
      in_flight += bytes;
      if (caps.inflight_bytes > 0) {
        ASSERT_LE(in_flight, caps.inflight_bytes);
      }
      if (caps.bytes_per_s > 0) {
        // Over every time up to now: since the moment when least had been moved for its time.
        ASSERT_LE(over + static_cast<double>(bytes) - least,
                  static_cast<double>(caps.bytes_per_s) * 0.010 + kPiece + 1);
      }
    }
    EXPECT_GT(moved, 0U);
  }
}

// --- In the transports

class ThrottleOf : public testing::TestWithParam<std::string> {
 protected:
  static constexpr uint64_t kKvBytes = 4 << 20;

  void SetUp() override {
    const std::string missing = WhyMissing(GetParam());
    if (!missing.empty()) GTEST_SKIP() << missing;
  }
  // Both sides have the throttle: it counts every byte once all the same.
  void Open(Caps caps) {
    throttle_ = std::make_shared<Throttle>(caps);
    const auto share = [this](Options& options) { options.throttle = throttle_; };
    owner_ = std::make_unique<Node>(GetParam(), dir_.path(), kKvBytes, share);
    reader_ = std::make_unique<Node>(GetParam(), dir_.path(), kKvBytes, share);
    owner_->Fill(1);
    owner_->StartLease(0);
    const auto peer = reader_->Connect(owner_->Spec("owner"));
    ASSERT_TRUE(peer.has_value()) << peer.error().ToString();
    peer_ = *peer;
  }
  // All of the KV.
  OpId Start(const Terms& terms, Done done) {
    if (reader_->transport().style() == Style::kOneSided) {
      return reader_->transport().Read(peer_, Whole(Contiguous(0, kKvBytes)), Node::guard(0), terms,
                                       std::move(done));
    }
    constexpr uint64_t kChunk = 256 << 10;
    constexpr uint32_t kChunks = kKvBytes / kChunk;
    const GuardExpectation lease = Lease(owner_->Spec(""), 0);
    const OpId op = reader_->transport().StartPackedReceive(
        peer_, ++stream_, ReceivePlan(kChunks, kChunk), lease, terms, std::move(done));
    Terms of_owner = terms;
    of_owner.deadline += seconds(1);  // the reader's own comes first
    owner_->transport().StartPackedSend(reader_->Spec("reader"), stream_, SendPlan(kChunks, kChunk),
                                        owner_->record(0), lease, of_owner,
                                        [](const Completion&) {});
    return op;
  }
  // The owner hears later than the reader that its last message was taken.
  bool NothingIsInFlight() {
    return reader_->control().RunUntil([&] { return throttle_->counts().inflight_bytes == 0; });
  }

  TempDir dir_;
  std::shared_ptr<Throttle> throttle_;
  std::unique_ptr<Node> owner_;
  std::unique_ptr<Node> reader_;
  PeerHandle peer_ = 0;
  StreamId stream_ = 0;
};

TEST_P(ThrottleOf, CountsEveryByteOnceAndTakesItsTime) {
  constexpr uint64_t kRate = 32 << 20;
  Open({.bytes_per_s = kRate, .inflight_bytes = 1 << 20});
  const TimePoint begin = std::chrono::steady_clock::now();
  const Completion done =
      reader_->Await([&](Done on_done) { return Start(In(seconds(60)), std::move(on_done)); });
  const double took = ToMillis(std::chrono::steady_clock::now() - begin) / 1000;
  ASSERT_TRUE(done.status.ok()) << done.status.ToString();
  EXPECT_EQ(reader_->FirstWrong(1, kKvBytes), std::nullopt);
  // Not before the rate allows the last piece, of 10 ms or one chunk, as the first one.
  const double least = static_cast<double>(kKvBytes - (512 << 10)) / kRate - 0.010;
  EXPECT_GE(took, least);
  EXPECT_TRUE(NothingIsInFlight());
  EXPECT_EQ(throttle_->counts().moved_bytes, kKvBytes);
  EXPECT_GT(throttle_->counts().waits, 0U);
}

TEST_P(ThrottleOf, MovesAllUnderACapSmallerThanAPiece) {
  Open({.inflight_bytes = 1000});
  const Completion done =
      reader_->Await([&](Done on_done) { return Start(In(seconds(60)), std::move(on_done)); });
  ASSERT_TRUE(done.status.ok()) << done.status.ToString();
  EXPECT_EQ(reader_->FirstWrong(1, kKvBytes), std::nullopt);
  EXPECT_TRUE(NothingIsInFlight());
  EXPECT_EQ(throttle_->counts().moved_bytes, kKvBytes);
}

TEST_P(ThrottleOf, WhatWaitsForTheCapIsCancelledAndNothingLandsAfterwards) {
  Open({.bytes_per_s = 64 << 10});  // a minute for all
  std::optional<Completion> done;
  const OpId op = Start(In(seconds(600)), [&](const Completion& c) { done = c; });
  ASSERT_TRUE(reader_->control().RunUntil([&] { return throttle_->counts().waits > 0; }));
  reader_->transport().Cancel(op);
  ASSERT_TRUE(reader_->control().RunUntil([&] { return done.has_value(); }));
  EXPECT_EQ(done->status.code(), Code::kCancelled);
  EXPECT_LT(done->bytes, kKvBytes);
  const std::vector<std::byte> after(reader_->kv(), reader_->kv() + kKvBytes);
  reader_->control().RunFor(Millis(30));
  EXPECT_TRUE(std::equal(after.begin(), after.end(), reader_->kv()));
  EXPECT_TRUE(NothingIsInFlight());
}

TEST_P(ThrottleOf, WhatWaitsForTheCapEndsAtItsDeadline) {
  Open({.bytes_per_s = 64 << 10});
  const TimePoint deadline = In(Millis(200));
  const Completion done =
      reader_->Await([&](Done on_done) { return Start(deadline, std::move(on_done)); });
  EXPECT_EQ(done.status.code(), Code::kDeadlineExceeded) << done.status.ToString();
  EXPECT_GE(std::chrono::steady_clock::now(), deadline);
  EXPECT_TRUE(NothingIsInFlight());
}

// Who is next is decided once all that wait are known: until then the test has something in flight.
TEST_P(ThrottleOf, TheUrgentGoFirst) {
  Open({.bytes_per_s = 64 << 20, .inflight_bytes = 256 << 10});
  Gate blocker(throttle_);
  ASSERT_TRUE(blocker.Begin(kDecode, 256 << 10, std::chrono::steady_clock::now()));
  std::vector<std::string> order;
  const auto says = [&order](std::string what) {
    return [&order, what = std::move(what)](const Completion& completion) {
      order.push_back(completion.status.ok() ? what : completion.status.ToString());
    };
  };
  Start({In(seconds(60)), kPrefetch, 1}, says("prefetch"));
  Start({In(seconds(60)), kDecode, 2}, says("decode"));
  blocker.End(256 << 10, 0);
  ASSERT_TRUE(reader_->control().RunUntil([&] { return order.size() == 2; }));
  EXPECT_EQ(order, (std::vector<std::string>{"decode", "prefetch"}));
}

TEST_P(ThrottleOf, TwoSessionsShareIt) {
  Open({.bytes_per_s = 64 << 20, .inflight_bytes = 256 << 10});
  Gate blocker(throttle_);
  ASSERT_TRUE(blocker.Begin(kDecode, 256 << 10, std::chrono::steady_clock::now()));
  std::vector<Completion> done;
  const OpId first =
      Start({In(seconds(60)), kDecode, 1}, [&](const Completion& c) { done.push_back(c); });
  const OpId second =
      Start({In(seconds(60)), kDecode, 2}, [&](const Completion& c) { done.push_back(c); });
  blocker.End(256 << 10, 0);
  ASSERT_TRUE(reader_->control().RunUntil([&] { return !done.empty(); }));
  reader_->transport().Cancel(first);
  reader_->transport().Cancel(second);
  ASSERT_TRUE(reader_->control().RunUntil([&] { return done.size() == 2; }));
  EXPECT_TRUE(done[0].status.ok()) << done[0].status.ToString();
  EXPECT_GT(done[1].bytes, kKvBytes / 2);
}

INSTANTIATE_TEST_SUITE_P(All, ThrottleOf,
                         testing::Values("mapped", "ucx-get", "ucx-packed", "zmq-packed"),
                         [](const auto& test) {
                           std::string name = test.param;
                           std::erase(name, '-');
                           return name;
                         });

}  // namespace
}  // namespace kvrelay::transport
