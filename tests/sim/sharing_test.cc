// Many pulls through one process's transport, on virtual time: who moves when, and how much.
#include <gtest/gtest.h>

#include <algorithm>
#include <cstdlib>
#include <deque>
#include <memory>
#include <optional>
#include <random>
#include <string>
#include <vector>

#include "tests/sim/world.h"
#include "transport/fake_transport.h"
#include "transport/throttle.h"

namespace kvrelay::sim {
namespace {

using transport::Caps;
using transport::Completion;
using transport::FakeFabric;
using transport::FakeTransport;
using transport::OpId;
using transport::PeerHandle;
using transport::Portion;
using transport::Style;
using transport::Terms;
using transport::Throttle;

constexpr uint64_t kWords = 512;  // of one read
constexpr uint64_t kBytes = kWords * sizeof(uint64_t);
constexpr uint64_t kPieceBytes = 4 * sizeof(uint64_t);  // the fabric's words_per_step

uint64_t TestSeed() {
  const char* const given = std::getenv("KVRELAY_SEED");
  return given != nullptr ? std::strtoull(given, nullptr, 10) : std::random_device{}();
}

// An owner, and readers with a transport each. Every read moves all of the owner's words to a place
// of its own.
class Sharing : public testing::Test {
 protected:
  static constexpr uint64_t kMaxReads = 64;

  struct Reading {
    size_t reader = 0;
    uint64_t session = 0;
    Priority priority = Priority::kDecode;
    const uint64_t* words = nullptr;
    OpId op = 0;
    std::optional<Completion> done;
    uint64_t others_moved = 0;  // by `watched`, when its data began
    const Reading* watched = nullptr;

    uint64_t moved() const {
      return sizeof(uint64_t) * static_cast<uint64_t>(std::count(words, words + kWords, kFull));
    }
  };
  struct Reader {
    std::vector<uint64_t> words = std::vector<uint64_t>(kMaxReads * kWords);
    std::unique_ptr<FakeTransport> transport;
    PeerHandle peer = 0;
    size_t reads = 0;
  };

  void Open(uint64_t seed, size_t readers, const std::shared_ptr<Throttle>& throttle) {
    world_ = std::make_unique<World>(seed);
    process_ = std::make_unique<Process>(*world_);
    fabric_ = std::make_unique<FakeFabric>([this] { return world_->random.Next(); });
    fabric_->script.in_turn = true;
    const auto region = [](std::vector<uint64_t>& words) {
      return transport::LocalRegion{reinterpret_cast<std::byte*>(words.data()),
                                    words.size() * sizeof(uint64_t)};
    };
    const transport::LocalRegion records{reinterpret_cast<std::byte*>(&record_), sizeof(record_)};
    owner_ = std::make_unique<FakeTransport>(*fabric_, *process_, "mapped", Style::kOneSided,
                                             "owner", std::vector{region(source_), records}, 1);
    for (size_t i = 0; i < readers; ++i) {
      Reader& reader = readers_.emplace_back();
      reader.transport = std::make_unique<FakeTransport>(
          *fabric_, *process_, "mapped", Style::kOneSided, "reader " + std::to_string(i),
          std::vector{region(reader.words)}, 2 + i, throttle);
      reader.transport->Connect(
          {.name = "owner", .address = "owner", .region_bytes = {}, .incarnation = 1}, {},
          [&reader](const Result<PeerHandle>& peer) { reader.peer = *peer; }, [] {});
    }
    RunFor(Millis(5));
  }
  void Close() {
    reads_.clear();
    readers_.clear();
    owner_.reset();
    fabric_.reset();
    process_.reset();
    world_.reset();
  }
  Reading& Start(size_t reader_index, uint64_t session, Priority priority,
                 const Reading* watched = nullptr) {
    Reader& reader = readers_[reader_index];
    const uint64_t offset = reader.reads++ * kBytes;
    Reading& read = reads_.emplace_back();
    read.reader = reader_index;
    read.session = session;
    read.priority = priority;
    read.words = reader.words.data() + offset / sizeof(uint64_t);
    read.watched = watched;
    CopyPlan plan;
    plan.boxes.resize(1);
    plan.boxes[0].run_bytes = kBytes;
    plan.places.push_back({0, 0, 0, offset});
    plan.segments.push_back({0, 0});
    read.op = reader.transport->Read(
        reader.peer,
        [&read, plan](const GuardWords&) -> Result<Portion> {
          if (read.watched != nullptr) read.others_moved = read.watched->moved();
          return Portion{plan, true};
        },
        {1, 0}, Terms(world_->Now() + Millis(1'000'000), priority, session),
        [&read](const Completion& completion) { read.done = completion; });
    return read;
  }
  void RunFor(Duration time) { ASSERT_TRUE(world_->Run(world_->Now() + time, 10'000'000)); }
  bool AllDone() const {
    return std::ranges::all_of(reads_, [](const Reading& read) { return read.done.has_value(); });
  }

  static constexpr uint64_t kFull = 0x0102030405060708;
  std::vector<uint64_t> source_ = std::vector<uint64_t>(kWords, kFull);
  LeaseRecord record_;
  std::unique_ptr<World> world_;
  std::unique_ptr<Process> process_;
  std::unique_ptr<FakeFabric> fabric_;
  std::unique_ptr<FakeTransport> owner_;
  std::deque<Reader> readers_;
  std::deque<Reading> reads_;
};

TEST_F(Sharing, RandomSessionsOfOnePriorityAreNeverFarApartAndTheUrgentGoFirst) {
  const uint64_t seed = TestSeed();
  SCOPED_TRACE("KVRELAY_SEED=" + std::to_string(seed));
  std::mt19937_64 random(seed);
  for (int round = 0; round < 10; ++round) {
    // A cap changes how much moves, not who is next.
    Open(random(), 1,
         round % 2 == 0 ? nullptr
                        : std::make_shared<Throttle>(
                              Caps{.bytes_per_s = 100'000, .inflight_bytes = kPieceBytes}));
    struct Session {
      Priority priority = Priority::kDecode;
      std::vector<Reading*> reads;
      uint64_t moved = 0;
      uint64_t left() const { return reads.size() * kBytes - moved; }
    };
    std::vector<Session> sessions(2 + random() % 4);
    for (size_t i = 0; i < sessions.size(); ++i) {
      sessions[i].priority = random() % 3 == 0 ? Priority::kPrefetch : Priority::kDecode;
      for (uint64_t n = 1 + random() % 3; n > 0; --n) {
        sessions[i].reads.push_back(&Start(0, 1 + i, sessions[i].priority));
      }
    }
    RunFor(Millis(2));  // all have begun
    std::vector<int64_t> at_first(sessions.size());
    bool urgent_before = false;
    for (bool first = true; !AllDone(); first = false) {
      RunFor(Millis(1));
      bool urgent = false;
      for (size_t i = 0; i < sessions.size(); ++i) {
        Session& session = sessions[i];
        uint64_t moved = 0;
        for (const Reading* read : session.reads) moved += read->moved();
        if (session.priority == Priority::kPrefetch && !first) {
          // Urgent words were left all the time since the last look: until the next one they are.
          ASSERT_TRUE(!urgent_before || moved == session.moved) << "round " << round;
        }
        session.moved = moved;
        if (first) at_first[i] = static_cast<int64_t>(moved);
      }
      for (const Session& session : sessions) {
        urgent |= session.priority == Priority::kDecode && session.left() > 0;
      }
      urgent_before = urgent && std::ranges::any_of(sessions, [](const Session& session) {
                        // More than a millisecond's worth, so that they last to the next look.
                        return session.priority == Priority::kDecode && session.left() > kBytes / 2;
                      });
      for (size_t i = 0; i < sessions.size(); ++i) {
        for (size_t k = i + 1; k < sessions.size(); ++k) {
          const Session& a = sessions[i];
          const Session& b = sessions[k];
          if (a.priority != b.priority || a.left() == 0 || b.left() == 0) continue;
          const int64_t apart = (static_cast<int64_t>(a.moved) - at_first[i]) -
                                (static_cast<int64_t>(b.moved) - at_first[k]);
          ASSERT_LE(std::abs(apart),
                    static_cast<int64_t>(2 * (FakeTransport::kTurnBytes + kPieceBytes)))
              << "round " << round << ": sessions " << i << " and " << k;
        }
      }
    }
    for (const Reading& read : reads_) EXPECT_EQ(read.moved(), kBytes);
    Close();
  }
}

TEST_F(Sharing, AReadThatAUserWaitsForOvertakesARunningPrefetch) {
  const uint64_t seed = TestSeed();
  SCOPED_TRACE("KVRELAY_SEED=" + std::to_string(seed));
  Open(seed, 1, nullptr);
  const Reading& prefetch = Start(0, 1, Priority::kPrefetch);
  while (prefetch.moved() < kBytes / 8) RunFor(Millis(1));
  const Reading& decode = Start(0, 2, Priority::kDecode, &prefetch);
  uint64_t moved = 0;
  while (decode.moved() < kBytes) {
    moved = prefetch.moved();
    ASSERT_LT(moved, kBytes);
    RunFor(std::chrono::microseconds(100));
  }
  // From when the decode's data began until they were there.
  EXPECT_EQ(moved, decode.others_moved);
  while (!AllDone()) RunFor(Millis(1));
  EXPECT_EQ(prefetch.moved(), kBytes);
}

TEST_F(Sharing, TheRateHoldsOverEveryTimeAndIsUsed) {
  const uint64_t seed = TestSeed();
  SCOPED_TRACE("KVRELAY_SEED=" + std::to_string(seed));
  constexpr uint64_t kRate = 20'000;
  const auto throttle = std::make_shared<Throttle>(Caps{.bytes_per_s = kRate});
  Open(seed, 3, throttle);
  for (int i = 0; i < 6; ++i) Start(i % 3, 1 + i, i < 2 ? Priority::kPrefetch : Priority::kDecode);
  constexpr Duration kStep = Millis(5);
  std::vector<uint64_t> moved = {0};
  while (!AllDone()) {
    RunFor(kStep);
    uint64_t sum = 0;
    for (const Reading& read : reads_) sum += read.moved();
    moved.push_back(sum);
  }
  const double burst = kRate * ToMillis(Throttle::kBurst) / 1000 + kPieceBytes;
  for (size_t end = 1; end < moved.size(); ++end) {
    for (size_t begin = 0; begin < end; ++begin) {
      const double time = ToMillis(kStep) / 1000 * static_cast<double>(end - begin);
      ASSERT_LE(static_cast<double>(moved[end] - moved[begin]), kRate * time + burst)
          << "from " << begin << " to " << end << " of " << moved.size();
    }
  }
  const double all = ToMillis(kStep) / 1000 * static_cast<double>(moved.size() - 1);
  EXPECT_GE(static_cast<double>(moved.back()), 0.8 * kRate * all);
  EXPECT_EQ(throttle->counts().moved_bytes, 6 * kBytes);
  EXPECT_EQ(throttle->counts().inflight_bytes, 0U);
  EXPECT_GT(throttle->counts().waits, 0U);
}

TEST_F(Sharing, WhatIsCancelledUnderACapWritesNothingAfterwardsAndGivesItsShareBack) {
  const uint64_t seed = TestSeed();
  SCOPED_TRACE("KVRELAY_SEED=" + std::to_string(seed));
  std::mt19937_64 random(seed);
  for (int round = 0; round < 8; ++round) {
    const auto throttle =
        std::make_shared<Throttle>(Caps{.bytes_per_s = 40'000, .inflight_bytes = kPieceBytes});
    Open(random(), 2, throttle);
    for (int i = 0; i < 6; ++i) {
      Start(i % 2, 1 + i, random() % 2 == 0 ? Priority::kPrefetch : Priority::kDecode);
    }
    std::vector<std::pair<const Reading*, uint64_t>> cancelled;
    for (int i = 0; i < 3; ++i) {
      RunFor(Millis(static_cast<int64_t>(random() % 100)));
      const Reading& read = reads_[random() % reads_.size()];
      if (read.done) continue;
      readers_[read.reader].transport->Cancel(read.op);
      RunFor(Millis(1));
      ASSERT_TRUE(read.done.has_value());
      ASSERT_EQ(read.done->status.code(), Code::kCancelled);
      cancelled.emplace_back(&read, read.moved());
    }
    while (!AllDone()) RunFor(Millis(5));
    for (const Reading& read : reads_) {
      const auto over =
          std::ranges::find(cancelled, &read, &decltype(cancelled)::value_type::first);
      EXPECT_EQ(read.moved(), over == cancelled.end() ? kBytes : over->second);
    }
    EXPECT_EQ(throttle->counts().inflight_bytes, 0U);
    Close();
  }
}

}  // namespace
}  // namespace kvrelay::sim
