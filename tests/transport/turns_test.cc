#include "transport/turns.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <cstdlib>
#include <list>
#include <map>
#include <mutex>
#include <optional>
#include <random>
#include <string>
#include <vector>

#include "tests/transport/node.h"

namespace kvrelay::transport {
namespace {

using std::chrono::seconds;

constexpr uint64_t kTurn = 1000;
constexpr TimePoint kAnyDeadline{};  // turns do not depend on it

struct Op {
  char name = 0;
  Turns::Place place;
  bool ready = true;
};

// Who moves, `pieces` times.
std::string Order(Turns& turns, std::list<Op>& ops, int pieces, uint64_t bytes) {
  std::string order;
  for (int i = 0; i < pieces; ++i) {
    const auto next = NextInTurn(ops, [](const Op& op) { return op.ready; });
    if (next == ops.end()) return order + ".";
    turns.Moved(next->place, bytes);
    order += next->name;
  }
  return order;
}

TEST(Turns, SessionsMoveAsManyBytesEach) {
  Turns turns(kTurn);
  std::list<Op> ops;
  for (const char name : {'a', 'b', 'c'}) ops.push_back({name, turns.Enter(kAnyDeadline)});
  EXPECT_EQ(Order(turns, ops, 9, 500), "aabbccaab");
}

TEST(Turns, TheMoreUrgentGoFirstWhoeverCameBefore) {
  Turns turns(kTurn);
  std::list<Op> ops;
  ops.push_back({'p', turns.Enter({kAnyDeadline, Priority::kPrefetch, 1})});
  EXPECT_EQ(Order(turns, ops, 2, 400), "pp");
  ops.push_back({'d', turns.Enter({kAnyDeadline, Priority::kDecode, 2})});
  EXPECT_EQ(Order(turns, ops, 4, 400), "dddd");
  ops.back().ready = false;  // waits for the prompt's computation
  EXPECT_EQ(Order(turns, ops, 2, 400), "pp");
  ops.back().ready = true;
  EXPECT_EQ(Order(turns, ops, 2, 400), "dd");
  ops.pop_back();
  EXPECT_EQ(Order(turns, ops, 2, 400), "pp");
  ops.front().ready = false;
  EXPECT_EQ(Order(turns, ops, 2, 400), ".");
}

TEST(Turns, ASessionHasOneTurnHoweverManyOperations) {
  Turns turns(kTurn);
  std::list<Op> ops;
  for (const char name : {'a', 'a', 'a', 'b'}) {
    ops.push_back(
        {name, turns.Enter({kAnyDeadline, Priority::kDecode, static_cast<uint64_t>(name)})});
  }
  EXPECT_EQ(Order(turns, ops, 6, kTurn), "ababab");
}

TEST(Turns, NewcomersDoNotKeepAnOlderSessionFromItsTurn) {
  Turns turns(kTurn);
  std::list<Op> ops;
  ops.push_back({'o', turns.Enter(kAnyDeadline)});
  std::string order;
  for (int i = 0; i < 6; ++i) {
    ops.push_back({'n', turns.Enter(kAnyDeadline)});
    ops.push_back({'n', turns.Enter(kAnyDeadline)});
    order += Order(turns, ops, 3, kTurn);
  }
  EXPECT_GE(std::ranges::count(order, 'o'), 2) << order;
}

// Sessions that come, go, and have nothing to move at times: whoever moves is of the highest
// priority that can; and between two of one priority, in any time in which both always could, the
// difference in bytes has a bound.
TEST(Turns, RandomSessionsShareWithinTheBound) {
  const char* const given = std::getenv("KVRELAY_SEED");
  const uint64_t seed =
      given != nullptr ? std::strtoull(given, nullptr, 10) : std::random_device{}();
  SCOPED_TRACE("KVRELAY_SEED=" + std::to_string(seed));
  std::mt19937_64 random(seed);
  const auto below = [&](uint64_t n) { return random() % n; };

  struct Session {
    uint64_t id = 0;
    Priority priority = Priority::kDecode;
    int64_t moved = 0;
    bool can = false;
  };
  struct RandomOp {
    size_t session = 0;
    Turns::Place place;
    bool ready = true;
  };
  constexpr uint64_t kPiece = 300;
  for (int round = 0; round < 200; ++round) {
    Turns turns(kTurn);
    std::vector<Session> sessions(2 + below(6));
    for (size_t i = 0; i < sessions.size(); ++i) {
      sessions[i] = {.id = 1 + i,
                     .priority = below(3) == 0 ? Priority::kPrefetch : Priority::kDecode};
    }
    std::list<RandomOp> ops;
    // By pair: the range of the difference since both could move.
    std::map<std::pair<size_t, size_t>, std::pair<int64_t, int64_t>> ranges;
    for (int step = 0; step < 300; ++step) {
      if (ops.empty() || below(20) == 0) {
        const size_t session = below(sessions.size());
        ops.push_back({session, turns.Enter({kAnyDeadline, sessions[session].priority,
                                             sessions[session].id})});
      }
      if (ops.size() > 1 && below(25) == 0) ops.pop_front();
      for (RandomOp& op : ops) {
        if (below(30) == 0) op.ready = !op.ready;
      }
      for (Session& session : sessions) session.can = false;
      bool urgent = false;
      for (const RandomOp& op : ops) {
        if (!op.ready) continue;
        sessions[op.session].can = true;
        urgent |= sessions[op.session].priority == Priority::kDecode;
      }
      const auto next = NextInTurn(ops, [](const RandomOp& op) { return op.ready; });
      ASSERT_EQ(next == ops.end(),
                std::ranges::none_of(ops, [](const RandomOp& op) { return op.ready; }));
      if (next != ops.end()) {
        Session& mover = sessions[next->session];
        ASSERT_TRUE(mover.priority == Priority::kDecode || !urgent);
        const uint64_t bytes = 1 + below(kPiece);
        turns.Moved(next->place, bytes);
        mover.moved += static_cast<int64_t>(bytes);
      }
      for (size_t i = 0; i < sessions.size(); ++i) {
        for (size_t k = i + 1; k < sessions.size(); ++k) {
          const Session& a = sessions[i];
          const Session& b = sessions[k];
          if (!a.can || !b.can || a.priority != b.priority) {
            ranges.erase({i, k});
            continue;
          }
          const int64_t apart = a.moved - b.moved;
          auto& [low, high] = ranges.try_emplace({i, k}, apart, apart).first->second;
          low = std::min(low, apart);
          high = std::max(high, apart);
          ASSERT_LE(high - low, static_cast<int64_t>(2 * (kTurn + kPiece)))
              << "round " << round << ", step " << step << ": sessions " << i << " and " << k;
        }
      }
    }
  }
}

// --- In the transports

// Portions that say when they were asked for. Called on the transfer thread.
class Log {
 public:
  void Add(char name) {
    const std::lock_guard lock(mutex_);
    names_ += name;
  }
  std::string names() const {
    const std::lock_guard lock(mutex_);
    return names_;
  }

 private:
  mutable std::mutex mutex_;
  std::string names_;
};

class TurnsOf : public testing::TestWithParam<std::string> {
 protected:
  static constexpr uint64_t kKvBytes = 4 << 20;

  void SetUp() override {
    const std::string missing = WhyMissing(GetParam());
    if (!missing.empty()) GTEST_SKIP() << missing;
  }
  // The whole KV, `times` times.
  static CopyPlan Repeated(uint32_t times) {
    CopyPlan plan = Contiguous(0, kKvBytes);
    plan.segments.assign(times, {0, 0});
    plan.boxes[0].num_segments = times;
    return plan;
  }
  // Portions of the whole KV until told to end.
  NextPortion Endless(char name) {
    return [this, name](const GuardWords&) -> Result<Portion> {
      log_.Add(name);
      return Portion{Repeated(1), stop_.load()};
    };
  }
  void Start(Node& reader, PeerHandle peer, NextPortion next, const Terms& terms) {
    ++open_;
    reader.transport().Read(peer, std::move(next), Node::guard(0), terms,
                            [this](const Completion& completion) {
                              EXPECT_TRUE(completion.status.ok()) << completion.status.ToString();
                              --open_;
                            });
  }

  TempDir dir_;
  Log log_;
  std::atomic<bool> stop_{false};
  int open_ = 0;
};

TEST_P(TurnsOf, AReadThatAUserWaitsForOvertakesALargePrefetch) {
  Node owner(GetParam(), dir_.path(), kKvBytes);
  Node reader(GetParam(), dir_.path(), kKvBytes);
  owner.Fill(1);
  owner.StartLease(0);
  const auto peer = reader.Connect(owner.Spec("owner"));
  ASSERT_TRUE(peer.has_value()) << peer.error().ToString();

  Start(reader, *peer, Endless('p'), {In(seconds(60)), Priority::kPrefetch, 1});
  ASSERT_TRUE(reader.control().RunUntil([&] { return log_.names().size() >= 3; }));
  int portions = 0;
  const NextPortion decode = [&](const GuardWords&) -> Result<Portion> {
    log_.Add('d');
    ++portions;
    return Portion{Repeated(portions == 1 ? 32 : 1), portions > 1};
  };
  Start(reader, *peer, decode, {In(seconds(60)), Priority::kDecode, 2});
  // It ends while the prefetch is under way, and goes on.
  ASSERT_TRUE(reader.control().RunUntil([&] { return open_ == 1; }));
  const std::string names = log_.names();
  const size_t first = names.find('d');
  const size_t last = names.rfind('d');
  ASSERT_NE(first, last) << names;
  // What was begun before it goes on; then nothing moves but the decode's 32 times as many bytes.
  EXPECT_LE(std::count(names.begin() + static_cast<ptrdiff_t>(first),
                       names.begin() + static_cast<ptrdiff_t>(last), 'p'),
            2)
      << names;
  ASSERT_TRUE(reader.control().RunUntil([&] { return log_.names().size() > names.size(); }));
  stop_ = true;
  EXPECT_TRUE(reader.control().RunUntil([&] { return open_ == 0; }));
  EXPECT_EQ(reader.FirstWrong(1, kKvBytes), std::nullopt);
}

INSTANTIATE_TEST_SUITE_P(All, TurnsOf, testing::Values("mapped", "ucx-get"), [](const auto& test) {
  return test.param == "mapped" ? "Mapped" : "UcxGet";
});

using MappedTurns = TurnsOf;
INSTANTIATE_TEST_SUITE_P(Mapped, MappedTurns, testing::Values("mapped"));

TEST_P(MappedTurns, SessionsMoveAsManyBytesWhateverTheNumberOfTheirReads) {
  Node owner(GetParam(), dir_.path(), kKvBytes);
  Node reader(GetParam(), dir_.path(), kKvBytes);
  owner.StartLease(0);
  const auto peer = reader.Connect(owner.Spec("owner"));
  ASSERT_TRUE(peer.has_value()) << peer.error().ToString();
  for (int i = 0; i < 3; ++i) Start(reader, *peer, Endless('a'), {In(seconds(60)), {}, 1});
  Start(reader, *peer, Endless('b'), {In(seconds(60)), {}, 2});
  const auto count = [](std::string_view names, char name) {
    return std::ranges::count(names, name);
  };
  ASSERT_TRUE(reader.control().RunUntil([&] { return count(log_.names(), 'b') >= 20; }));
  stop_ = true;
  const std::string names = log_.names();
  // From when both are there: never apart by more than two turns of two portions, and what was
  // begun.
  const std::string both = names.substr(names.find('b'), 40);
  for (size_t end = 1; end <= both.size(); ++end) {
    const std::string_view part(both.data(), end);
    ASSERT_LE(std::abs(count(part, 'a') - count(part, 'b')), 6) << names;
  }
  EXPECT_TRUE(reader.control().RunUntil([&] { return open_ == 0; }));
}

// The owner's chunks, on one rail to one reader.
class PackedTurns : public testing::Test {
 protected:
  static constexpr uint64_t kKvBytes = 4 << 20;
  static constexpr uint64_t kChunk = 64 << 10;

  // The first holds the owner's thread up until Go, so that all others begin together.
  void Send(Node& owner, const PeerSpec& reader, char name, uint32_t chunks, const Terms& terms) {
    StreamPlan plan = SendPlan(chunks, kChunk);
    plan.plan_chunk = [this, name, whole = plan.plan_chunk](uint32_t chunk) {
      std::unique_lock lock(mutex_);
      log_.Add(name);
      all_there_.wait_for(lock, seconds(20), [this] { return go_; });
      return whole(chunk);
    };
    ++open_;
    owner.transport().StartPackedSend(
        reader, static_cast<StreamId>(name), std::move(plan), owner.record(0),
        Lease(owner.Spec(""), 0), terms, [this](const Completion& completion) {
          EXPECT_TRUE(completion.status.ok()) << completion.status.ToString();
          --open_;
        });
  }
  void Go() {
    const std::lock_guard lock(mutex_);
    go_ = true;
    all_there_.notify_all();
  }

  static void SmallChunks(Options& options) { options.chunk_bytes = kChunk; }

  Log log_;
  std::mutex mutex_;
  std::condition_variable all_there_;
  bool go_ = false;
  int open_ = 0;
};

TEST_F(PackedTurns, StreamsOfOnePriorityGoChunkByChunkAndUrgentOnesFirst) {
  Node owner("ucx-rail", "", kKvBytes, SmallChunks);
  Node reader("ucx-rail", "", kKvBytes, SmallChunks);
  owner.StartLease(0);
  const PeerSpec to = reader.Spec("reader");
  Send(owner, to, 'g', 1, In(seconds(60)));
  ASSERT_TRUE(owner.control().RunUntil([&] { return log_.names() == "g"; }));
  Send(owner, to, 'p', 8, {In(seconds(60)), Priority::kPrefetch, 1});
  Send(owner, to, 'a', 8, {In(seconds(60)), Priority::kDecode, 2});
  Send(owner, to, 'b', 8, {In(seconds(60)), Priority::kDecode, 3});
  Go();
  // The reader drops them: nobody asked for these streams.
  ASSERT_TRUE(owner.control().RunUntil([&] { return open_ == 0; }));
  EXPECT_EQ(log_.names(),
            "g"
            "abababababababab"
            "pppppppp");
}

}  // namespace
}  // namespace kvrelay::transport
