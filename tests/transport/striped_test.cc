#include "transport/striped.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cstring>
#include <deque>
#include <map>
#include <memory>
#include <optional>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include "tests/transport/node.h"

namespace kvrelay::transport {
namespace {

using std::chrono::seconds;
using testing::ElementsAre;

// A rail whose operations end when the test says so.
class ScriptedRail final : public Transport {
 public:
  struct Started {
    PeerHandle peer = 0;  // of a receive
    Address reader;       // of a send
    StreamPlan plan;
    Done done;
  };
  struct Connecting {
    Address address;
    std::function<void(Result<PeerHandle>)> connected;
    std::function<void()> on_death;
  };

  explicit ScriptedRail(Address address) : address_(std::move(address)) {}

  std::string_view name() const override { return "scripted"; }
  Style style() const override { return Style::kPacked; }
  Address LocalAddress() const override { return address_; }
  Counters counters() const override { return {{"started", started.size()}}; }
  void Connect(PeerSpec peer, TimePoint, std::function<void(Result<PeerHandle>)> connected,
               std::function<void()> on_death) override {
    connecting.push_back({peer.address, std::move(connected), std::move(on_death)});
  }
  void Disconnect(PeerHandle peer) override { disconnected.insert(peer); }
  OpId Read(PeerHandle, NextPortion, GuardRef, Terms, Done) override { return 0; }
  OpId StartPackedReceive(PeerHandle peer, StreamId, StreamPlan plan, GuardExpectation, Terms,
                          Done done) override {
    started[++last_] = {peer, {}, std::move(plan), std::move(done)};
    return last_;
  }
  OpId StartPackedSend(PeerSpec reader, StreamId, StreamPlan plan, const LeaseRecord*,
                       GuardExpectation, Terms, Done done) override {
    started[++last_] = {0, reader.address, std::move(plan), std::move(done)};
    return last_;
  }
  void Cancel(OpId op) override { cancelled.insert(op); }

  void End(OpId op, Status status, uint64_t bytes = 0, uint64_t word = 0) {
    Completion completion;
    completion.status = std::move(status);
    completion.bytes = bytes;
    completion.before.w0 = word;
    completion.after.w0 = word + 1;
    const Done done = std::move(started.at(op).done);
    started.erase(op);
    done(completion);
  }

  std::map<OpId, Started> started;
  std::deque<Connecting> connecting;
  std::set<OpId> cancelled;
  std::set<PeerHandle> disconnected;

 private:
  const Address address_;
  OpId last_ = 0;
};

class StripedTest : public testing::Test {
 protected:
  void Make(size_t count) {
    std::vector<std::unique_ptr<Transport>> made;
    for (size_t i = 0; i < count; ++i) {
      auto rail = std::make_unique<ScriptedRail>("own" + std::to_string(i));
      rails_.push_back(rail.get());
      made.push_back(std::move(rail));
    }
    striped_ = Stripe(std::move(made), control_.executor());
  }
  // Connected to a peer of `peer_rails` rails; rail i of ours calls it 10 + i.
  PeerHandle Connected(size_t peer_rails) {
    StartConnecting(peer_rails);
    for (size_t i = 0; i < rails_.size(); ++i) rails_[i]->connecting.back().connected(10 + i);
    EXPECT_TRUE(connected_.has_value() && connected_->has_value());
    return **connected_;
  }
  void StartConnecting(size_t peer_rails) {
    StripedAddress address;
    for (size_t i = 0; i < peer_rails; ++i) address.rails.push_back("peer" + std::to_string(i));
    connected_.reset();
    striped_->Connect(
        {"peer", address.Encode(), {}, 1}, In(seconds(1)),
        [this](Result<PeerHandle> result) { connected_ = std::move(result); },
        [this] { ++deaths_; });
  }
  OpId Receive(PeerHandle peer, uint32_t chunks) {
    return striped_->StartPackedReceive(peer, 1, Chunks(chunks), {}, In(seconds(1)), Collect());
  }
  // The plan of chunk c has c + 1 segments.
  static StreamPlan Chunks(uint32_t chunks) {
    return {chunks, 4096, [](uint32_t chunk) -> Result<CopyPlan> {
              CopyPlan plan;
              plan.segments.resize(chunk + 1);
              return plan;
            }};
  }
  Done Collect() {
    return [this](Completion completion) { completions_.push_back(std::move(completion)); };
  }

  Control control_;
  std::vector<ScriptedRail*> rails_;
  std::unique_ptr<Transport> striped_;
  std::optional<Result<PeerHandle>> connected_;
  int deaths_ = 0;
  std::vector<Completion> completions_;
};

TEST(StripedAddressTest, SurvivesTheWay) {
  const StripedAddress address{{"one", std::string("\0\xff two", 6), std::string(3000, 'x')}};
  const auto back = StripedAddress::Decode(address.Encode());
  ASSERT_TRUE(back.has_value());
  EXPECT_EQ(back->rails, address.rails);
}

TEST(StripedAddressTest, RefusesWhatItDidNotMake) {
  const Address good = StripedAddress{{"one", "two"}}.Encode();
  for (size_t length = 0; length < good.size(); ++length) {
    EXPECT_FALSE(StripedAddress::Decode(good.substr(0, length)).has_value()) << length;
  }
  EXPECT_FALSE(StripedAddress::Decode(good + "x").has_value());
  EXPECT_FALSE(StripedAddress::Decode(StripedAddress{}.Encode()).has_value()) << "no rails";
  EXPECT_FALSE(
      StripedAddress::Decode(StripedAddress{std::vector<Address>(17, "x")}.Encode()).has_value())
      << "too many rails";
  Address long_rail = good;
  long_rail[8] = '\xff';  // the first rail's length
  EXPECT_FALSE(StripedAddress::Decode(long_rail).has_value());
}

TEST(StripeOfTest, DealsEachChunkOnce) {
  for (uint32_t rails = 1; rails <= 5; ++rails) {
    for (uint32_t chunks = 0; chunks <= 13; ++chunks) {
      std::multiset<size_t> dealt;
      const StreamPlan whole{chunks, 1, [](uint32_t chunk) -> Result<CopyPlan> {
                               CopyPlan plan;
                               plan.segments.resize(chunk);
                               return plan;
                             }};
      for (uint32_t rail = 0; rail < rails; ++rail) {
        const StreamPlan stripe = StripeOf(whole, rail, rails);
        for (uint32_t i = 0; i < stripe.chunks; ++i) {
          dealt.insert(stripe.plan_chunk(i)->segments.size());
        }
      }
      std::multiset<size_t> all;
      for (uint32_t chunk = 0; chunk < chunks; ++chunk) all.insert(chunk);
      EXPECT_EQ(dealt, all) << chunks << " chunks over " << rails << " rails";
    }
  }
}

TEST_F(StripedTest, ConnectsEachRailToOneOfThePeers) {
  Make(3);
  StartConnecting(2);
  EXPECT_EQ(rails_[0]->connecting.back().address, "peer0");
  EXPECT_EQ(rails_[1]->connecting.back().address, "peer1");
  EXPECT_EQ(rails_[2]->connecting.back().address, "peer0");
  rails_[0]->connecting.back().connected(5);
  rails_[2]->connecting.back().connected(5);
  EXPECT_FALSE(connected_.has_value()) << "one rail has not answered";
  rails_[1]->connecting.back().connected(5);
  EXPECT_TRUE(connected_.has_value() && connected_->has_value());
}

TEST_F(StripedTest, APeerThatOneRailCannotReachIsNotConnected) {
  Make(2);
  StartConnecting(2);
  rails_[0]->connecting.back().connected(10);
  rails_[1]->connecting.back().connected(Error(Code::kPeerUnreachable, "no way"));
  ASSERT_TRUE(connected_.has_value());
  ASSERT_FALSE(connected_->has_value());
  EXPECT_EQ(connected_->error().message(), "no way");
  EXPECT_THAT(rails_[0]->disconnected, ElementsAre(10));
  rails_[0]->connecting.back().on_death();
  EXPECT_EQ(deaths_, 0);
}

TEST_F(StripedTest, AddsUpWhatTheStripesSaw) {
  Make(2);
  Receive(Connected(2), 5);  // chunks 0 2 4 and 1 3
  EXPECT_EQ(rails_[0]->started[1].plan.chunks, 3U);
  EXPECT_EQ(rails_[1]->started[1].plan.chunks, 2U);
  EXPECT_EQ(rails_[1]->started[1].peer, 11U);
  rails_[1]->End(1, Status::Ok(), 200, 70);
  EXPECT_TRUE(completions_.empty());
  rails_[0]->End(1, Status::Ok(), 300, 50);
  ASSERT_EQ(completions_.size(), 1U);
  EXPECT_TRUE(completions_[0].status.ok());
  EXPECT_EQ(completions_[0].bytes, 500U);
  EXPECT_EQ(completions_[0].before.w0, 50U) << "the first chunk's";
  EXPECT_EQ(completions_[0].after.w0, 51U) << "the last chunk's";
}

TEST_F(StripedTest, OneChunkNeedsOneRail) {
  Make(3);
  Receive(Connected(3), 1);
  EXPECT_EQ(rails_[0]->started.size(), 1U);
  EXPECT_TRUE(rails_[1]->started.empty() && rails_[2]->started.empty());
  rails_[0]->End(1, Status::Ok());
  EXPECT_EQ(completions_.size(), 1U);
}

TEST_F(StripedTest, AFailedStripeCancelsTheOthersAndWaitsForThem) {
  Make(3);
  Receive(Connected(3), 9);
  rails_[1]->End(1, Status(Code::kStaleRead, "the lease has ended"));
  EXPECT_THAT(rails_[0]->cancelled, ElementsAre(1));
  EXPECT_THAT(rails_[2]->cancelled, ElementsAre(1));
  rails_[0]->End(1, Status(Code::kCancelled, "cancelled"));
  EXPECT_TRUE(completions_.empty()) << "the third may still write";
  rails_[2]->End(1, Status::Ok());
  ASSERT_EQ(completions_.size(), 1U);
  EXPECT_EQ(completions_[0].status.code(), Code::kStaleRead);
}

TEST_F(StripedTest, CancelReachesWhatIsStillMoving) {
  Make(2);
  const OpId op = Receive(Connected(2), 4);
  rails_[0]->End(1, Status::Ok());
  striped_->Cancel(op);
  EXPECT_TRUE(rails_[0]->cancelled.empty());
  EXPECT_THAT(rails_[1]->cancelled, ElementsAre(1));
  rails_[1]->End(1, Status(Code::kCancelled, "cancelled"));
  EXPECT_EQ(completions_.size(), 1U);
  striped_->Cancel(op);
}

TEST_F(StripedTest, AReadersRailsDecideHowAStreamIsSent) {
  Make(2);
  const StripedAddress reader{{"r0", "r1", "r2"}};
  striped_->StartPackedSend({"reader", reader.Encode(), {}, 1}, 1, Chunks(7), nullptr, {},
                            In(seconds(1)), Collect());
  EXPECT_EQ(rails_[0]->started[1].reader, "r0");
  EXPECT_EQ(rails_[1]->started[1].reader, "r1");
  EXPECT_EQ(rails_[0]->started[2].reader, "r2");
  EXPECT_EQ(rails_[0]->started[1].plan.chunks, 3U);
  EXPECT_EQ(rails_[0]->started[2].plan.plan_chunk(1)->segments.size(), 6U) << "chunk 5";
  striped_->StartPackedSend({"reader", "garbage", {}, 1}, 2, Chunks(7), nullptr, {}, In(seconds(1)),
                            Collect());
  control_.RunFor(std::chrono::milliseconds(1));
  ASSERT_EQ(completions_.size(), 1U);
  EXPECT_EQ(completions_[0].status.code(), Code::kInvalidArgument);
}

TEST_F(StripedTest, TellsOfADeathOnceAndLast) {
  Make(2);
  const PeerHandle peer = Connected(2);
  Receive(peer, 4);
  rails_[0]->End(1, Status(Code::kPeerUnreachable, "dead"));
  rails_[0]->connecting.back().on_death();
  EXPECT_EQ(deaths_, 0) << "the other rail's stripe has not ended";
  EXPECT_THAT(rails_[1]->disconnected, ElementsAre(11));
  rails_[1]->connecting.back().on_death();
  rails_[1]->End(1, Status(Code::kPeerUnreachable, "dead"));
  EXPECT_EQ(completions_.size(), 1U);
  EXPECT_EQ(deaths_, 1);
  Receive(peer, 4);
  control_.RunFor(std::chrono::milliseconds(1));
  ASSERT_EQ(completions_.size(), 2U);
  EXPECT_EQ(completions_[1].status.code(), Code::kPeerUnreachable);
}

TEST_F(StripedTest, ADisconnectedPeersDeathIsNoNews) {
  Make(2);
  const PeerHandle peer = Connected(2);
  Receive(peer, 4);
  striped_->Disconnect(peer);
  EXPECT_THAT(rails_[0]->disconnected, ElementsAre(10));
  EXPECT_THAT(rails_[1]->disconnected, ElementsAre(11));
  rails_[0]->End(1, Status(Code::kCancelled, "disconnected"));
  rails_[1]->End(1, Status(Code::kCancelled, "disconnected"));
  EXPECT_EQ(completions_.size(), 1U);
  rails_[0]->connecting.back().on_death();
  EXPECT_EQ(deaths_, 0);
}

TEST_F(StripedTest, OperationsCompleteAfterItsEnd) {
  Make(2);
  Receive(Connected(2), 4);
  std::vector<Done> late;
  for (ScriptedRail* rail : rails_) late.push_back(std::move(rail->started[1].done));
  striped_.reset();
  Completion cancelled;
  cancelled.status = Status(Code::kCancelled, "the transport is closing");
  for (const Done& done : late) done(cancelled);
  ASSERT_EQ(completions_.size(), 1U);
  EXPECT_EQ(completions_[0].status.code(), Code::kCancelled);
}

TEST(StripedUcxTest, AnyNumberOfRailsOnEitherSide) {
  constexpr uint64_t kKvBytes = 4 << 20;
  constexpr uint64_t kChunk = 64 << 10;
  constexpr uint32_t kChunks = kKvBytes / kChunk;
  struct Rails {
    uint32_t owner;
    uint32_t reader;
  };
  for (const Rails rails : {Rails{1, 3}, Rails{2, 2}, Rails{3, 1}, Rails{2, 3}}) {
    SCOPED_TRACE(std::to_string(rails.owner) + " to " + std::to_string(rails.reader));
    Node owner("ucx-packed", "", kKvBytes, [&](Options& options) { options.rails = rails.owner; });
    Node reader("ucx-packed", "", kKvBytes,
                [&](Options& options) { options.rails = rails.reader; });
    owner.Fill(7);
    owner.StartLease(0);
    std::memset(reader.kv(), 0, kKvBytes);
    const auto peer = reader.Connect(owner.Spec("owner"));
    ASSERT_TRUE(peer.has_value()) << peer.error().ToString();
    bool sent = false;
    const Completion done = reader.Await([&](Done received) {
      const OpId op = reader.transport().StartPackedReceive(*peer, 5, ReceivePlan(kChunks, kChunk),
                                                            Lease(owner.Spec(""), 0),
                                                            In(seconds(20)), std::move(received));
      owner.transport().StartPackedSend(reader.Spec("reader"), 5, SendPlan(kChunks, kChunk),
                                        owner.record(0), Lease(owner.Spec(""), 0), In(seconds(20)),
                                        [&](const Completion& end) {
                                          EXPECT_TRUE(end.status.ok()) << end.status.ToString();
                                          EXPECT_EQ(end.bytes, kKvBytes);
                                          sent = true;
                                        });
      return op;
    });
    ASSERT_TRUE(done.status.ok()) << done.status.ToString();
    EXPECT_EQ(done.bytes, kKvBytes);
    EXPECT_TRUE(GuardHolds(Lease(owner.Spec(""), 0), done.before, done.after));
    EXPECT_EQ(reader.FirstWrong(7, kKvBytes), std::nullopt);
    EXPECT_TRUE(owner.control().RunUntil([&] { return sent; }));
  }
}

}  // namespace
}  // namespace kvrelay::transport
