#include "transport/packed_receive.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cstring>
#include <optional>
#include <random>
#include <string>
#include <vector>

#include "tests/transport/node.h"

namespace kvrelay::transport {
namespace {

using testing::HasSubstr;

const PeerSpec kOwnerSpec{.name = "owner", .address = {}, .region_bytes = {}, .incarnation = 77};

class PackedReceiverTest : public testing::Test {
 protected:
  static constexpr uint64_t kChunk = 64;
  static constexpr uint32_t kChunks = 4;

  PackedReceiverTest()
      : memory_(kChunk * kChunks, std::byte{0x5a}),
        region_{memory_.data(), memory_.size(), -1},
        receiver_(std::span(&region_, 1), nullptr, nullptr,
                  [](const Done& done, Completion completion) { done(std::move(completion)); }) {}

  void Expect(StreamId stream, OpId op = 1, PeerHandle peer = 1) {
    Expect(stream, ReceivePlan(kChunks, kChunk), op, peer);
  }
  void Expect(StreamId stream, StreamPlan plan, OpId op = 1, PeerHandle peer = 1) {
    receiver_.Start({.op = op,
                     .peer = peer,
                     .peer_name = "owner",
                     .incarnation = 77,
                     .stream = stream,
                     .plan = std::move(plan),
                     .want = Lease(kOwnerSpec, 0),
                     .deadline = TimePoint(std::chrono::seconds(10)),
                     .done = [this](Completion completion) {
                       ++completions_;
                       last_ = std::move(completion);
                     }});
  }
  static PackedHeader Header(StreamId stream, uint32_t chunk) {
    LeaseRecord record;
    record.Start(Lease(kOwnerSpec, 0).epoch, 77, Lease(kOwnerSpec, 0).table_hash);
    record.Publish({.tokens = 100, .chunk_end = 100, .layers = 0});
    PackedHeader header;
    header.stream = stream;
    header.chunk = chunk;
    header.chunks = kChunks;
    header.bytes = kChunk;
    header.sender = 77;
    header.before = record.ReadBefore();
    header.after = record.ReadAfter();
    return header;
  }
  void Arrive(const PackedHeader& header, uint64_t bytes = kChunk) {
    const std::vector<std::byte> data(bytes, static_cast<std::byte>(header.chunk));
    receiver_.OnMessage(header, data);
  }
  bool Untouched(uint32_t chunk) const {
    return memory_[chunk * kChunk] == std::byte{0x5a} &&
           memory_[(chunk + 1) * kChunk - 1] == std::byte{0x5a};
  }

  std::vector<std::byte> memory_;
  LocalRegion region_;
  PackedReceiver receiver_;
  int completions_ = 0;
  Completion last_;
};

TEST_F(PackedReceiverTest, CompletesWhenEveryChunkIsUnpacked) {
  Expect(5);
  for (uint32_t chunk = 0; chunk < kChunks; ++chunk) {
    EXPECT_EQ(completions_, 0);
    Arrive(Header(5, chunk));
  }
  EXPECT_EQ(completions_, 1);
  EXPECT_TRUE(last_.status.ok());
  EXPECT_EQ(last_.bytes, kChunk * kChunks);
  for (uint32_t chunk = 0; chunk < kChunks; ++chunk) {
    EXPECT_EQ(memory_[chunk * kChunk], static_cast<std::byte>(chunk));
  }
  // One chunk too many belongs to nobody.
  Arrive(Header(5, 0));
  EXPECT_EQ(receiver_.dropped(), 1U);
  EXPECT_EQ(completions_, 1);
}

TEST_F(PackedReceiverTest, ChunksComeInAnyOrder) {
  Expect(5);
  for (const uint32_t chunk : {2U, 0U, 3U, 1U}) {
    EXPECT_EQ(completions_, 0);
    Arrive(Header(5, chunk));
  }
  EXPECT_EQ(completions_, 1);
  EXPECT_TRUE(last_.status.ok()) << last_.status.ToString();
  for (uint32_t chunk = 0; chunk < kChunks; ++chunk) {
    EXPECT_EQ(memory_[chunk * kChunk], static_cast<std::byte>(chunk));
  }
}

TEST_F(PackedReceiverTest, AChunkThatIsNotDueFailsAndIsNotUnpacked) {
  for (const uint32_t wrong : {0U, 4U, 1000U}) {
    std::memset(memory_.data(), 0x5a, memory_.size());
    completions_ = 0;
    Expect(5);
    Arrive(Header(5, 0));
    std::memset(memory_.data(), 0x5a, memory_.size());
    Arrive(Header(5, wrong));
    ASSERT_EQ(completions_, 1) << wrong;
    EXPECT_EQ(last_.status.code(), Code::kInternal);
    EXPECT_THAT(last_.status.message(),
                HasSubstr(wrong == 0 ? "chunk 0 came twice" : "in a stream of 4 chunks"));
    // What still comes is dropped.
    Arrive(Header(5, 1));
    for (uint32_t chunk = 0; chunk < kChunks; ++chunk) EXPECT_TRUE(Untouched(chunk)) << chunk;
  }
}

TEST_F(PackedReceiverTest, EachChunksGuardCoversItsOwnExtent) {
  StreamPlan plan = ReceivePlan(kChunks, kChunk);
  plan.extent_of = [](uint32_t chunk) { return KvExtent{.tokens = 25 * (chunk + 1), .layers = 2}; };
  const auto arrive = [&](uint32_t chunk, const Progress& progress) {
    PackedHeader header = Header(5, chunk);
    header.before.w1 = progress.Pack();
    Arrive(header);
  };
  for (const bool enough : {true, false}) {
    completions_ = 0;
    Expect(5, plan);
    arrive(0, {.tokens = 25, .chunk_end = 25, .layers = 0});
    arrive(1, {.tokens = 25, .chunk_end = 60, .layers = 2});
    EXPECT_EQ(completions_, 0);
    arrive(2, {.tokens = 25, .chunk_end = 75, .layers = enough ? 2U : 1U});
    EXPECT_EQ(completions_, enough ? 0 : 1);
    if (!enough) {
      EXPECT_EQ(last_.status.code(), Code::kStaleRead);
    }
    receiver_.Cancel(1);
  }
}

TEST_F(PackedReceiverTest, AChunkOfTheWrongLengthFails) {
  for (const uint64_t bytes : {uint64_t{0}, kChunk - 8, kChunk + 8}) {
    completions_ = 0;
    Expect(5);
    PackedHeader header = Header(5, 0);
    header.bytes = bytes;
    Arrive(header, bytes);
    ASSERT_EQ(completions_, 1);
    EXPECT_EQ(last_.status.code(), Code::kInternal) << last_.status.ToString();
    EXPECT_TRUE(Untouched(0));
  }
}

TEST_F(PackedReceiverTest, GuardWordsOfEveryChunkCount) {
  const auto stale = [&](const std::function<void(PackedHeader&)>& change) {
    completions_ = 0;
    Expect(5);
    Arrive(Header(5, 0));
    PackedHeader header = Header(5, 1);
    change(header);
    Arrive(header);
    EXPECT_EQ(completions_, 1);
    EXPECT_TRUE(Untouched(1));
    return last_.status.code() == Code::kStaleRead;
  };
  EXPECT_TRUE(stale([](PackedHeader& h) { h.before.w0 ^= 1; }));
  EXPECT_TRUE(stale([](PackedHeader& h) { h.after.w0 ^= 1; }));
  EXPECT_TRUE(stale([](PackedHeader& h) { h.after.w0 += 2; }));
  EXPECT_TRUE(stale([](PackedHeader& h) { h.after.w2 += 1; }));
  EXPECT_TRUE(stale([](PackedHeader& h) { h.before.w3 += 1; }));
  EXPECT_TRUE(stale([](PackedHeader& h) { h.before.w1 = Progress{.tokens = 99}.Pack(); }));
}

TEST_F(PackedReceiverTest, AnotherIncarnationsChunksBelongToNobody) {
  Expect(5);
  PackedHeader header = Header(5, 0);
  header.sender = 78;
  Arrive(header);
  EXPECT_EQ(completions_, 0);
  EXPECT_EQ(receiver_.dropped(), 1U);
}

TEST_F(PackedReceiverTest, AStoppedStreamFailsWithItsReason) {
  Expect(5);
  PackedHeader header = Header(5, 2);
  header.kind = PackedKind::kStopped;
  header.code = static_cast<uint32_t>(Code::kStaleRead);
  header.bytes = 0;
  Arrive(header, 0);
  EXPECT_EQ(last_.status.code(), Code::kStaleRead);
  Expect(6);
  header.stream = 6;
  header.code = 4711;  // no code of ours
  Arrive(header, 0);
  EXPECT_EQ(last_.status.code(), Code::kPeerUnreachable);
}

TEST_F(PackedReceiverTest, EndsOnceByCancelDeadlineOrPeer) {
  Expect(1, 1, 1);
  Expect(2, 2, 1);
  Expect(3, 3, 2);
  Expect(3, 4, 2);  // the number is in use
  EXPECT_EQ(last_.status.code(), Code::kInvalidArgument);
  receiver_.Cancel(1);
  EXPECT_EQ(last_.status.code(), Code::kCancelled);
  receiver_.Cancel(1);
  receiver_.Cancel(99);
  EXPECT_EQ(completions_, 2);
  receiver_.FailPeer(1, Status(Code::kPeerUnreachable, "gone"));
  EXPECT_EQ(last_.status.code(), Code::kPeerUnreachable);
  EXPECT_EQ(completions_, 3);
  EXPECT_EQ(receiver_.Expire(TimePoint(std::chrono::seconds(9))),
            TimePoint(std::chrono::seconds(10)));
  EXPECT_EQ(completions_, 3);
  EXPECT_EQ(receiver_.Expire(TimePoint(std::chrono::seconds(10))), TimePoint::max());
  EXPECT_EQ(last_.status.code(), Code::kDeadlineExceeded);
  EXPECT_EQ(completions_, 4);
  EXPECT_EQ(receiver_.streams(), 0U);
}

TEST(PackedWireTest, HeadersAndAddressesAreTakenOnlyWhole) {
  PackedHeader header;
  header.bytes = 10;
  Seal(header);
  const auto bytes = std::as_bytes(std::span(&header, 1));
  EXPECT_TRUE(CheckHeader(bytes, 10).has_value());
  EXPECT_FALSE(CheckHeader(bytes, 11).has_value());
  EXPECT_FALSE(CheckHeader(bytes.first(bytes.size() - 1), 10).has_value());
  std::vector<std::byte> damaged(bytes.begin(), bytes.end());
  for (size_t i = 0; i < damaged.size() * 8; ++i) {
    damaged[i / 8] ^= static_cast<std::byte>(1U << (i % 8));
    EXPECT_FALSE(CheckHeader(damaged, 10).has_value()) << "bit " << i;
    damaged[i / 8] ^= static_cast<std::byte>(1U << (i % 8));
  }

  const PackedAddress address{
      .library = "ucx 1.22.0", .incarnation = 5, .worker = std::string("a\0b", 3)};
  const std::string encoded = address.Encode();
  const auto decoded = PackedAddress::Decode(encoded);
  ASSERT_TRUE(decoded.has_value());
  EXPECT_EQ(decoded->library, address.library);
  EXPECT_EQ(decoded->incarnation, 5U);
  EXPECT_EQ(decoded->worker, address.worker);
  for (size_t i = 0; i < encoded.size(); ++i) {
    EXPECT_FALSE(PackedAddress::Decode(encoded.substr(0, i)).has_value());
    std::string changed = encoded;
    changed[i] = static_cast<char>(changed[i] ^ 1);
    EXPECT_FALSE(PackedAddress::Decode(changed).has_value()) << "byte " << i;
  }
  EXPECT_FALSE(PackedAddress::Decode(encoded + "x").has_value());
  // Lengths that would reach beyond the end, with a checksum that fits.
  PackedAddress empty = address;
  empty.worker.clear();
  EXPECT_FALSE(PackedAddress::Decode(empty.Encode()).has_value());
  PackedAddress wide = address;
  wide.worker.assign(5000, 'x');
  EXPECT_FALSE(PackedAddress::Decode(wide.Encode()).has_value());
  PackedAddress wordy = address;
  wordy.library.assign(100, 'x');
  EXPECT_FALSE(PackedAddress::Decode(wordy.Encode()).has_value());
}

}  // namespace
}  // namespace kvrelay::transport
