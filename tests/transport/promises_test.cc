// What every transport promises, whatever it is made of: after an operation has ended nothing lands
// in its destination, and starting one copies nothing.
#include <gtest/gtest.h>

#include <algorithm>
#include <chrono>
#include <cstdlib>
#include <cstring>
#include <iostream>
#include <optional>
#include <random>
#include <sstream>
#include <string>
#include <vector>

#include "tests/common/slowness.h"
#include "tests/transport/owner_fixture.h"

namespace kvrelay::transport {
namespace {

using std::chrono::microseconds;
using std::chrono::milliseconds;
using std::chrono::seconds;

std::vector<std::string> Names() {
  std::vector<std::string> names;
  for (const TransportKind& kind : TransportKinds()) names.emplace_back(kind.name);
  return names;
}

class PromisesTest : public OwnerTest, public testing::WithParamInterface<std::string> {
 protected:
  static constexpr uint64_t kKvBytes = 32 << 20;
  static constexpr uint64_t kChunk = 256 << 10;
  static constexpr uint32_t kChunks = kKvBytes / kChunk;

  PromisesTest() : OwnerTest(GetParam(), kKvBytes) {}
  void SetUp() override {
    const std::string missing = WhyMissing(GetParam());
    if (!missing.empty()) GTEST_SKIP() << missing;
    const char* given = std::getenv("KVRELAY_SEED");
    const uint64_t seed = given != nullptr ? std::stoull(given) : std::random_device{}();
    std::cout << "KVRELAY_SEED=" << seed << "\n";
    random_.seed(seed);
  }
  // Starts to move all of the owner's KV, by whatever style the transport has.
  OpId StartPull(Node& reader, PeerHandle peer, Child& owner, TimePoint deadline, Done done) {
    if (reader.transport().style() == Style::kOneSided) {
      CopyPlan plan = Contiguous(0, kKvBytes);
      plan.segments.assign(50, {0, 0});  // and again, so that there is time to end it
      plan.boxes[0].num_segments = 50;
      return reader.transport().Read(peer, Whole(std::move(plan)), Node::guard(0), deadline,
                                     std::move(done));
    }
    const StreamId stream = ++stream_;
    const OpId op = reader.transport().StartPackedReceive(
        peer, stream, ReceivePlan(kChunks, kChunk), Lease(spec_, 0), deadline, std::move(done));
    std::ostringstream line;
    line << "send " << ToText(reader.Spec("reader")) << ' ' << stream << ' ' << kChunks << ' '
         << kChunk << " 0 20000";
    owner.Send(line.str());
    return op;
  }
  Duration UpTo(Duration most) {
    return Duration(static_cast<int64_t>(random_() % static_cast<uint64_t>(most.count())));
  }
  // Once the operation has ended: whether the destination stays as it is now.
  static void ExpectUntouched(Node& reader) {
    std::memset(reader.kv(), 0x5a, kKvBytes);
    reader.control().RunFor(milliseconds(80));
    const auto* words = reinterpret_cast<const uint64_t*>(reader.kv());
    const auto* end = words + kKvBytes / sizeof(uint64_t);
    const auto* wrong =
        std::find_if(words, end, [](uint64_t w) { return w != 0x5a5a5a5a5a5a5a5a; });
    EXPECT_EQ(wrong, end) << "a byte landed at " << (wrong - words) * 8;
  }

  std::mt19937_64 random_;
  StreamId stream_ = 0;
};

TEST_P(PromisesTest, NothingLandsAfterCancelOrDeadline) {
  const auto owner = StartOwner(3);
  Node reader(GetParam(), dir_.path(), kKvBytes);
  const auto peer = reader.Connect(spec_);
  ASSERT_TRUE(peer.has_value()) << peer.error().ToString();
  int ended = 0;
  for (int round = 0; round < 12; ++round) {
    const Duration time = UpTo(milliseconds(6));
    const bool cancel = round % 2 == 0;
    std::optional<Completion> done;
    const OpId op = StartPull(reader, *peer, *owner, In(cancel ? seconds(20) : time),
                              [&](Completion c) { done = std::move(c); });
    if (cancel) {
      reader.control().RunFor(time);
      reader.transport().Cancel(op);
    }
    ASSERT_TRUE(reader.control().RunUntil([&] { return done.has_value(); }));
    if (done->status.ok()) continue;  // it was faster
    ++ended;
    EXPECT_EQ(done->status.code(), cancel ? Code::kCancelled : Code::kDeadlineExceeded)
        << done->status.ToString();
    ExpectUntouched(reader);
  }
  EXPECT_GT(ended, 0);
}

TEST_P(PromisesTest, NothingLandsAfterTheOwnerDied) {
  int ended = 0;
  for (int round = 0; round < 4; ++round) {
    const auto owner = StartOwner(3);
    Node reader(GetParam(), dir_.path(), kKvBytes);
    const auto peer = reader.Connect(spec_);
    ASSERT_TRUE(peer.has_value()) << peer.error().ToString();
    std::optional<Completion> done;
    StartPull(reader, *peer, *owner, In(seconds(20)), [&](Completion c) { done = std::move(c); });
    reader.control().RunFor(UpTo(milliseconds(5)));
    owner->KillAndWait();
    ASSERT_TRUE(reader.control().RunUntil([&] { return done.has_value(); }, seconds(25)));
    if (done->status.ok()) continue;
    ++ended;
    ExpectUntouched(reader);
  }
  EXPECT_GT(ended, 0);
}

TEST_P(PromisesTest, NothingLandsAfterItsPeerWasDisconnected) {
  const auto owner = StartOwner(3);
  Node reader(GetParam(), dir_.path(), kKvBytes);
  for (int round = 0; round < 4; ++round) {
    const auto peer = reader.Connect(spec_);
    ASSERT_TRUE(peer.has_value()) << peer.error().ToString();
    std::optional<Completion> done;
    StartPull(reader, *peer, *owner, In(seconds(20)), [&](Completion c) { done = std::move(c); });
    reader.control().RunFor(UpTo(milliseconds(3)));
    reader.transport().Disconnect(*peer);
    ASSERT_TRUE(reader.control().RunUntil([&] { return done.has_value(); }));
    if (!done->status.ok()) ExpectUntouched(reader);
  }
}

// From the call to its return, whatever the size: the fastest of some calls, because others use the
// processor, too.
TEST_P(PromisesTest, PostingNeverCopies) {
  const auto owner = StartOwner(3);
  Node reader(GetParam(), dir_.path(), kKvBytes);
  reader.Fill(1);
  reader.StartLease(0);
  const auto peer = reader.Connect(spec_);
  ASSERT_TRUE(peer.has_value()) << peer.error().ToString();
  constexpr uint32_t kSlice = 4096;
  for (const uint64_t bytes : {uint64_t{kChunk}, kKvBytes}) {
    CopyPlan plan = Contiguous(0, kSlice);
    plan.segments.clear();
    for (uint64_t at = 0; at < bytes; at += kSlice) plan.segments.push_back({at, at});
    plan.boxes[0].num_segments = static_cast<uint32_t>(plan.segments.size());
    Duration fastest = seconds(1);
    for (int i = 0; i < 10; ++i) {
      NextPortion next = Whole(plan);
      StreamPlan send = SendPlan(static_cast<uint32_t>(bytes / kChunk), kChunk);
      StreamPlan receive = ReceivePlan(static_cast<uint32_t>(bytes / kChunk), kChunk);
      const PeerSpec to = reader.Spec("itself");
      int open = 0;
      const auto done = [&open](const Completion&) { --open; };
      std::vector<OpId> ops;
      const TimePoint begin = In({});
      if (reader.transport().style() == Style::kOneSided) {
        ops.push_back(reader.transport().Read(*peer, std::move(next), Node::guard(0),
                                              begin + seconds(20), done));
      } else {
        ops.push_back(reader.transport().StartPackedReceive(
            *peer, ++stream_, std::move(receive), Lease(spec_, 0), begin + seconds(20), done));
        ops.push_back(reader.transport().StartPackedSend(to, 1'000'000 + stream_, std::move(send),
                                                         reader.record(0), Lease(to, 0),
                                                         begin + seconds(20), done));
      }
      fastest = std::min<Duration>(fastest, In({}) - begin);
      open += static_cast<int>(ops.size());
      for (const OpId op : ops) reader.transport().Cancel(op);
      ASSERT_TRUE(reader.control().RunUntil([&] { return open == 0; }));
    }
    std::cout << bytes / 1024 << " KiB: posted in " << ToMillis(fastest) * 1000 << " us\n";
    EXPECT_LT(fastest, microseconds(200) * tests::Slowness());
  }
}

INSTANTIATE_TEST_SUITE_P(Transports, PromisesTest, testing::ValuesIn(Names()),
                         [](const auto& param) {
                           std::string name = param.param;
                           std::replace(name.begin(), name.end(), '-', '_');
                           return name;
                         });

}  // namespace
}  // namespace kvrelay::transport
