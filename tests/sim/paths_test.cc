// Which path a rank's pull takes to a peer's memory, and what becomes of its blocks where
// operations cannot be recalled: the real reader on virtual time, over transports whose operations
// end when the test says.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <map>
#include <memory>
#include <numeric>
#include <optional>
#include <string>
#include <vector>

#include "agent/leader_link.h"
#include "agent/peer_table.h"
#include "agent/rank_links.h"
#include "agent/reader_rank.h"
#include "proto/codec.h"
#include "tests/sim/kv_model.h"
#include "tests/sim/sim_rpc.h"

namespace kvrelay::sim {
namespace {

using testing::HasSubstr;
using transport::Completion;
using transport::Done;
using transport::OpId;
using transport::PeerHandle;
using transport::Style;

// Moves nothing. Connecting works unless `refuses` says why not; an operation completes by End,
// also one that was cancelled.
class HeldTransport final : public transport::Transport {
 public:
  HeldTransport(Clock& clock, std::string name, Style style)
      : clock_(clock), name_(std::move(name)), style_(style) {}

  std::string_view name() const override { return name_; }
  Style style() const override { return style_; }
  transport::Address LocalAddress() const override { return "here"; }
  std::string lanes() const override { return style_ == Style::kOneSided ? "cma" : ""; }
  bool moves_any_plan() const override { return style_ == Style::kPacked; }
  bool lingers() const override { return style_ == Style::kOneSided; }
  void Connect(transport::PeerSpec, TimePoint, std::function<void(Result<PeerHandle>)> connected,
               std::function<void()>) override {
    clock_.CallAfter({}, [this, connected = std::move(connected)] {
      if (refuses.ok()) return connected(PeerHandle{1});
      connected(Error(refuses));
    });
  }
  void Disconnect(PeerHandle) override { ++disconnects; }
  OpId Read(PeerHandle, transport::NextPortion, transport::GuardRef, transport::Terms,
            Done done) override {
    return Start(std::move(done));
  }
  OpId StartPackedReceive(PeerHandle, transport::StreamId, transport::StreamPlan, GuardExpectation,
                          transport::Terms, Done done) override {
    return Start(std::move(done));
  }
  OpId StartPackedSend(transport::PeerSpec, transport::StreamId, transport::StreamPlan,
                       const LeaseRecord*, GuardExpectation, transport::Terms, Done done) override {
    return Start(std::move(done));
  }
  void Cancel(OpId) override { ++cancels; }

  void EndFirst(Status status) {
    ASSERT_FALSE(open.empty());
    const Done done = std::move(open.begin()->second);
    open.erase(open.begin());
    done({.status = std::move(status), .before = {}, .after = {}, .bytes = 0});
  }

  Status refuses;
  int disconnects = 0;
  int cancels = 0;
  std::map<OpId, Done> open;

 private:
  OpId Start(Done done) {
    open[++ids_] = std::move(done);
    return ids_;
  }

  Clock& clock_;
  const std::string name_;
  const Style style_;
  OpId ids_ = 0;
};

// A rank that reads, its leader, and an owner that only answers.
class Paths : public testing::Test {
 protected:
  // All that a pull may leave in quarantine is half of this cache: 16 tokens and a few.
  static constexpr uint32_t kTokens = 16;
  static constexpr uint64_t kBytes = kTokens * kLayers * kHeads * 2 * sizeof(uint64_t);

  void SetUp() override { offered_ = {"ucx-get", "ucx-packed"}; }
  void Open(bool with_packed = true, uint64_t max_asked_bytes = 0) {
    const auto add = [&](const char* name, Style style) {
      transports_.push_back(std::make_unique<HeldTransport>(reader_process_, name, style));
      return transports_.back().get();
    };
    get_ = add("ucx-get", Style::kOneSided);
    if (with_packed) packed_ = add("ucx-packed", Style::kPacked);
    owner_.Handle(proto::Type::kGetMeta,
                  [this](std::string_view, const agent::ResponderPtr& responder) {
                    responder->Reply(proto::Encode(OwnersMeta()), false);
                  });
    owner_.Handle(proto::Type::kPackedRead,
                  [this](std::string_view body, const agent::ResponderPtr& responder) {
                    asked_.push_back(proto::Decode<proto::PackedRead>(body).value());
                    responder->Reply(proto::Encode(proto::Empty{}), false);
                  });
    owner_.Handle(proto::Type::kPackedCancel,
                  [](std::string_view, const agent::ResponderPtr& responder) {
                    responder->Reply(proto::Encode(proto::Empty{}), false);
                  });
    std::vector<transport::Transport*> transports;
    for (const auto& transport : transports_) transports.push_back(transport.get());
    const agent::RankIdentity identity{.engine = {},
                                       .incarnation = 2,
                                       .rank = 0,
                                       .model = kModel,
                                       .model_name = "tiny",
                                       .layout = memory_.layout(),
                                       .shard = memory_.shard(),
                                       .regions = Regions()};
    link_.emplace(env_, identity.incarnation);
    peers_ = std::make_unique<agent::PeerTable>(env_, identity, transports);
    rank_ =
        std::make_unique<agent::ReaderRank>(env_, *link_, *peers_, identity, 64, max_asked_bytes);
    leader_links_.emplace(leader_env_, kLeader, std::vector<std::string>{"reader"});
    RunFor(Millis(100));
    ASSERT_TRUE(leader_links_->AllKnown());
  }
  void RunFor(Duration time) { ASSERT_TRUE(world_.Run(world_.Now() + time, 1'000'000)); }

  std::vector<proto::RegionInfo> Regions() {
    std::vector<proto::RegionInfo> regions;
    for (const auto& region : memory_.regions()) regions.push_back({region.bytes, "cpu", "memfd"});
    return regions;
  }
  proto::Meta OwnersMeta() {
    proto::Meta meta{.engine = {},
                     .incarnation = 1,
                     .rank = 0,
                     .model = kModel,
                     .model_name = "tiny",
                     .layout = memory_.layout(),
                     .shard = memory_.shard(),
                     .regions = Regions(),
                     .record_region = 1,
                     .record_slots = kRecordSlots,
                     .table_hash_key = std::string(16, 'k'),
                     .addresses = {}};
    for (const std::string& name : offered_) meta.addresses.push_back({name, "there"});
    return meta;
  }

  using Answer = std::shared_ptr<std::optional<Result<std::string>>>;
  // Of the leader's to the rank.
  template <typename Message>
  Answer Ask(proto::Type type, const Message& message) {
    const auto answer = std::make_shared<std::optional<Result<std::string>>>();
    leader_.Call("reader", type, proto::Encode(message), world_.Now() + Millis(100'000),
                 [answer](const Result<std::string>& reply, bool) { *answer = reply; });
    return answer;
  }
  // A pull of kTokens of a lease that the owner has.
  Answer Pull(uint64_t number, Priority priority = Priority::kDecode) {
    KvTable table;
    table.blocks.resize(kTokens / kBlockSize);
    std::iota(table.blocks.begin(), table.blocks.end(), 0);
    proto::Pull pull{.leader = kLeader,
                     .number = number,
                     .peer_front = "owner",
                     .owner = {},
                     .lease = {},
                     .hash = {},
                     .claim = {},
                     .tokens = {0, kTokens},
                     .own_tables = {table},
                     .priority = priority,
                     .timeout_ms = 60'000};
    pull.claim.tables = {table};
    pull.claim.tokens = kTokens;
    pull.claim.ranks = {{.endpoint = "owner",
                         .rank = 0,
                         .incarnation = 1,
                         .slot = 0,
                         .epoch = 5,
                         .shard = memory_.shard(),
                         .scales = {}}};
    pull.claim.ttl_ms = 60'000;
    Answer answer = Ask(proto::Type::kPull, pull);
    RunFor(Millis(50));
    return answer;
  }
  Answer Drop(uint64_t number) {
    Answer answer = Ask(proto::Type::kDrop, proto::Drop{.leader = kLeader, .number = number});
    RunFor(Millis(50));
    return answer;
  }
  static std::string PathOf(const Answer& pull) {
    if (!pull->has_value()) return "open";
    const Result<std::string>& reply = **pull;
    return reply.has_value() ? proto::Decode<proto::PullReply>(*reply)->path
                             : reply.error().ToString();
  }
  std::string Why() const {
    const auto peers = peers_->List();
    return peers.empty() ? "no peer" : peers.front().path + ": " + peers.front().why;
  }

  static constexpr Incarnation kLeader = 9;
  World world_{1};
  Network network_{world_};
  Process owner_process_{world_};
  Process reader_process_{world_};
  Process leader_process_{world_};
  SimRpc owner_{network_, owner_process_, "owner", "owner"};
  SimRpc reader_{network_, reader_process_, "reader", "reader"};
  SimRpc leader_{network_, leader_process_, "leader", "leader"};
  agent::Counters counters_;
  agent::Env env_{reader_process_, reader_, counters_, [this] { return world_.random.Next(); }};
  agent::Env leader_env_{leader_process_, leader_, counters_,
                         [this] { return world_.random.Next(); }};
  RankMemory memory_{1, 0, KvFormat::kNhd};
  std::vector<std::string> offered_;      // transports, by the owner
  std::vector<proto::PackedRead> asked_;  // of it, in the order in which they came
  std::vector<std::unique_ptr<HeldTransport>> transports_;
  HeldTransport* get_ = nullptr;
  HeldTransport* packed_ = nullptr;
  std::optional<agent::LeaderLink> link_;
  std::unique_ptr<agent::PeerTable> peers_;
  std::unique_ptr<agent::ReaderRank> rank_;
  std::optional<agent::RankLinks> leader_links_;
};

TEST_F(Paths, OneSidedReadsAreTakenWhereTheyWork) {
  Open();
  Pull(1);
  EXPECT_EQ(get_->open.size(), 1U);
  EXPECT_TRUE(packed_->open.empty());
  EXPECT_EQ(Why(), "ucx-get+ucx-packed: ucx-get over cma, ucx-packed for casts and short runs");
}

TEST_F(Paths, APeerWithoutAOneSidedLaneIsReadByStreams) {
  offered_ = {"ucx-packed"};
  Open();
  const Answer pull = Pull(1);
  EXPECT_TRUE(get_->open.empty());
  packed_->EndFirst(Status::Ok());
  RunFor(Millis(50));
  EXPECT_EQ(PathOf(pull), "ucx-packed");
  EXPECT_EQ(Why(), "ucx-packed: not ucx-get: the peer does not offer it");
}

TEST_F(Paths, APeerWhoseFirstOneSidedReadFailsIsReadByStreams) {
  Open();
  get_->refuses = {Code::kPeerUnreachable, "no one-sided read of it: Input/output error"};
  const Answer pull = Pull(1);
  packed_->EndFirst(Status::Ok());
  RunFor(Millis(50));
  EXPECT_EQ(PathOf(pull), "ucx-packed");
  EXPECT_EQ(Why(), "ucx-packed: not ucx-get: no one-sided read of it: Input/output error");
}

TEST_F(Paths, AfterReadsFailInAPullThePeerIsAskedAnewAndStreamsTakeOver) {
  Open();
  const Answer pull = Pull(1);
  get_->refuses = {Code::kPeerUnreachable, "no one-sided read of it: Connection reset"};
  get_->EndFirst({Code::kPeerUnreachable, "Connection reset"});
  RunFor(Millis(50));
  EXPECT_THAT(PathOf(pull), HasSubstr("kPeerUnreachable"));
  EXPECT_THAT(PathOf(pull), HasSubstr("Connection reset"));
  EXPECT_EQ(get_->disconnects, 1);
  EXPECT_EQ(Why(), "no peer");

  const Answer again = Pull(2);
  packed_->EndFirst(Status::Ok());
  RunFor(Millis(50));
  EXPECT_EQ(PathOf(again), "ucx-packed");
  EXPECT_EQ(Why(), "ucx-packed: not ucx-get: no one-sided read of it: Connection reset");
}

TEST_F(Paths, BlocksStayWithACancelledPullUntilItsOperationsAreOver) {
  Open();
  const Answer pull = Pull(1);
  const Answer drop = Drop(1);
  EXPECT_THAT(PathOf(pull), HasSubstr("kCancelled")) << "who waits hears at once";
  EXPECT_EQ(get_->cancels, 1);
  RunFor(Millis(30'000));
  EXPECT_FALSE(drop->has_value()) << "the blocks were given back while a read may write them";
  ASSERT_EQ(rank_->List().size(), 1U);
  EXPECT_EQ(rank_->List()[0].state, "draining");

  get_->EndFirst({Code::kCancelled, "cancelled"});
  RunFor(Millis(50));
  ASSERT_TRUE(drop->has_value());
  EXPECT_TRUE((*drop)->has_value());
  EXPECT_TRUE(rank_->List().empty());
}

TEST_F(Paths, WhenTheQuarantineIsFullPullsGoByStreamsUntilItHasRoomAgain) {
  Open();
  Pull(1);
  const Answer drop = Drop(1);
  // The room for it was reserved when it began, and is kept while it drains.
  const Answer second = Pull(2);
  EXPECT_EQ(get_->open.size(), 1U);
  ASSERT_EQ(packed_->open.size(), 1U);
  packed_->EndFirst(Status::Ok());
  RunFor(Millis(50));
  EXPECT_EQ(PathOf(second), "ucx-packed");
  EXPECT_FALSE(drop->has_value());

  get_->EndFirst({Code::kCancelled, "cancelled"});
  RunFor(Millis(50));
  EXPECT_TRUE(drop->has_value());
  Pull(3);
  EXPECT_EQ(get_->open.size(), 1U);
  EXPECT_TRUE(packed_->open.empty());
}

TEST_F(Paths, WithNoOtherPathAFullQuarantineRefuses) {
  Open(/*with_packed=*/false);
  Pull(1);
  Drop(1);
  const Answer second = Pull(2);
  EXPECT_THAT(PathOf(second), HasSubstr("ucx-get: no room in quarantine for " +
                                        std::to_string(kBytes) + " bytes, "));
  EXPECT_THAT(PathOf(second), HasSubstr(" are free"));
  EXPECT_EQ(get_->open.size(), 1U);
}

// A rank that asks for four pieces of two tokens at a time, or as much: half of a pull.
class AskingForLittle : public Paths {
 protected:
  static constexpr uint64_t kMost = kBytes / 2;
  static constexpr size_t kPiecesAtOnce = 4;
  static constexpr uint32_t kPieceTokens = 2;

  void SetUp() override {
    offered_ = {"ucx-packed"};
    Open(/*with_packed=*/true, kMost);
  }
  // Of the first `n` streams in work each has arrived, or ended so.
  void End(size_t n, const Status& status = Status::Ok()) {
    for (size_t i = 0; i < n; ++i) packed_->EndFirst(status);
    RunFor(Millis(50));
  }
};

TEST_F(AskingForLittle, AStreamIsAskedForInPiecesAsTheyAreTaken) {
  const Answer pull = Pull(1);
  for (size_t taken = 0; taken < kTokens / kPieceTokens; ++taken) {
    EXPECT_EQ(packed_->open.size(), std::min(kPiecesAtOnce, kTokens / kPieceTokens - taken));
    EXPECT_FALSE(pull->has_value());
    End(1);
  }
  ASSERT_EQ(asked_.size(), kTokens / kPieceTokens);
  std::ranges::sort(asked_, {}, [](const auto& read) { return read.shape.tokens.begin; });
  for (uint32_t i = 0; i < asked_.size(); ++i) {
    EXPECT_EQ(asked_[i].shape.tokens, (TokenRange{i * kPieceTokens, (i + 1) * kPieceTokens}));
  }
  ASSERT_EQ(PathOf(pull), "ucx-packed");
  EXPECT_EQ(proto::Decode<proto::PullReply>(*pull->value())->bytes, kBytes);
}

TEST_F(AskingForLittle, WhatUsersWaitForIsAskedForFirst) {
  Pull(1, Priority::kPrefetch);
  Pull(2, Priority::kDecode);
  EXPECT_EQ(asked_.size(), kPiecesAtOnce) << "the prefetch was first, and fills the window";
  End(kPiecesAtOnce);
  End(kPiecesAtOnce);
  End(kPiecesAtOnce);
  End(kPiecesAtOnce);
  std::string order;
  for (const proto::PackedRead& read : asked_) {
    order += read.priority == Priority::kDecode ? 'D' : 'p';
  }
  EXPECT_EQ(order, "ppppDDDDDDDDpppp");
}

TEST_F(AskingForLittle, ACancelledPullAsksForNothingMoreAndMakesRoomOnceItsStreamsAreOver) {
  const Answer first = Pull(1);
  const Answer second = Pull(2);
  const Answer drop = Drop(1);
  EXPECT_THAT(PathOf(first), HasSubstr("kCancelled"));
  EXPECT_EQ(packed_->cancels, static_cast<int>(kPiecesAtOnce));
  EXPECT_EQ(asked_.size(), kPiecesAtOnce) << "what was asked for may still come";
  End(kPiecesAtOnce, {Code::kCancelled, "cancelled"});
  EXPECT_TRUE(drop->has_value());
  EXPECT_EQ(asked_.size(), 2 * kPiecesAtOnce);
  End(kPiecesAtOnce);
  End(kPiecesAtOnce);
  EXPECT_EQ(PathOf(second), "ucx-packed");
  EXPECT_EQ(asked_.size(), kPiecesAtOnce + kTokens / kPieceTokens);
  EXPECT_TRUE(rank_->List().empty());
}

TEST_F(AskingForLittle, APieceThatFailsEndsThePull) {
  const Answer pull = Pull(1);
  End(1, {Code::kStaleRead, "the lease has ended"});
  EXPECT_THAT(PathOf(pull), HasSubstr("kStaleRead"));
  EXPECT_EQ(asked_.size(), kPiecesAtOnce);
  End(kPiecesAtOnce - 1, {Code::kCancelled, "cancelled"});
  EXPECT_TRUE(rank_->List().empty());
  // The window is free again.
  Pull(2);
  EXPECT_EQ(asked_.size(), 2 * kPiecesAtOnce);
}

}  // namespace
}  // namespace kvrelay::sim
