// What CURVE adds to a packed stream: who may connect, and what those get who may not.
#include <gtest/gtest.h>
#include <zmq.h>

#include <map>
#include <memory>
#include <string>

#include "tests/common/slowness.h"
#include "tests/transport/node.h"
#include "transport/curve.h"
#include "transport/packed_wire.h"
#include "transport/striped.h"

namespace kvrelay::transport {
namespace {

using std::chrono::milliseconds;
using std::chrono::seconds;

constexpr uint64_t kKvBytes = 4 << 20;
constexpr uint64_t kChunk = 256 << 10;
constexpr uint32_t kChunks = kKvBytes / kChunk;

using Identity = std::shared_ptr<CurveIdentity>;

Identity New() { return std::make_shared<CurveIdentity>(NewCurveIdentity()); }

std::unique_ptr<Node> Start(const Identity& identity) {
  return std::make_unique<Node>("zmq-packed", "", kKvBytes,
                                [&](Options& options) { options.curve = identity; });
}

uint64_t CounterOf(Node& node, std::string_view wanted) {
  for (const auto& [name, value] : node.transport().counters()) {
    if (name == wanted) return value;
  }
  ADD_FAILURE() << "no counter " << wanted;
  return 0;
}

// Moves the owner's KV to the reader.
Completion Pull(Node& owner, Node& reader, Duration timeout = seconds(20)) {
  owner.Fill(7);
  owner.StartLease(0);
  const PeerSpec spec = owner.Spec("owner");
  const auto peer = reader.Connect(
      spec, [] {}, timeout);
  if (!peer.has_value()) {
    Completion refused;
    refused.status = peer.error();
    return refused;
  }
  std::optional<Completion> sent;
  const Completion got = reader.Await([&](Done done) {
    const OpId op = reader.transport().StartPackedReceive(
        *peer, 1, ReceivePlan(kChunks, kChunk), Lease(spec, 0), In(seconds(20)), std::move(done));
    owner.transport().StartPackedSend(reader.Spec("reader"), 1, SendPlan(kChunks, kChunk),
                                      owner.record(0), Lease(spec, 0), In(seconds(20)),
                                      [&](Completion c) { sent = std::move(c); });
    return op;
  });
  EXPECT_TRUE(owner.control().RunUntil([&] { return sent.has_value(); }));
  return got;
}

TEST(ZmqPacked, MovesBetweenTwoThatAllowEachOther) {
  const Identity a = New();
  const Identity b = New();
  a->allowed.insert(b->public_key);
  b->allowed.insert(a->public_key);
  const auto owner = Start(a);
  const auto reader = Start(b);
  const Completion got = Pull(*owner, *reader);
  ASSERT_TRUE(got.status.ok()) << got.status.ToString();
  EXPECT_EQ(got.bytes, kKvBytes);
  EXPECT_EQ(reader->FirstWrong(7, kKvBytes), std::nullopt);
}

TEST(ZmqPacked, WithoutKeysOfTheirOwnAnyTwoMove) {
  const auto owner = Start(nullptr);
  const auto reader = Start(nullptr);
  const Completion got = Pull(*owner, *reader);
  ASSERT_TRUE(got.status.ok()) << got.status.ToString();
  EXPECT_EQ(reader->FirstWrong(7, kKvBytes), std::nullopt);
}

TEST(ZmqPacked, AnOwnerRefusesAKeyThatItDoesNotAllow) {
  const Identity a = New();
  const Identity b = New();
  b->allowed.insert(a->public_key);
  const auto owner = Start(a);
  const auto reader = Start(b);
  const TimePoint begin = In({});
  const Completion got = Pull(*owner, *reader);
  EXPECT_EQ(got.status.code(), Code::kRefused) << got.status.ToString();
  EXPECT_NE(got.status.message().find("does not allow our key"), std::string::npos)
      << got.status.message();
  EXPECT_LT(In({}) - begin, seconds(3) * tests::Slowness());
  EXPECT_TRUE(owner->control().RunUntil([&] { return CounterOf(*owner, "bad_messages") > 0; }));
}

TEST(ZmqPacked, AReaderDoesNotConnectToAKeyThatItDoesNotAllow) {
  const Identity a = New();
  const Identity b = New();
  a->allowed.insert(b->public_key);
  const auto owner = Start(a);
  const auto reader = Start(b);
  const Completion got = Pull(*owner, *reader);
  EXPECT_EQ(got.status.code(), Code::kRefused);
  EXPECT_NE(got.status.message().find(KeyToText(a->public_key)), std::string::npos)
      << got.status.message();
}

// Another process has taken the port of one that is gone, and does not have its key.
TEST(ZmqPacked, APortWithAnotherKeyIsRefused) {
  const Identity a = New();
  const Identity b = New();
  b->anybody = true;
  const auto owner = Start(a);
  const auto reader = Start(b);
  PeerSpec spec = owner->Spec("owner");
  StripedAddress rails = *StripedAddress::Decode(spec.address);
  for (Address& rail : rails.rails) {
    PackedAddress address = *PackedAddress::Decode(rail);
    KeyedEndpoint at = *KeyedEndpoint::FromText(address.worker);
    at.key = New()->public_key;
    address.worker = at.ToText();
    rail = address.Encode();
  }
  spec.address = rails.Encode();
  const TimePoint begin = In({});
  const auto peer = reader->Connect(spec);
  ASSERT_FALSE(peer.has_value());
  EXPECT_EQ(peer.error().code(), Code::kRefused) << peer.error().ToString();
  EXPECT_LT(In({}) - begin, seconds(5) * tests::Slowness());
}

TEST(ZmqPacked, AddressesOfOtherKindsAreRefused) {
  const auto reader = Start(nullptr);
  const std::string key = KeyToText(New()->public_key);
  for (const std::string worker :
       {"tcp://127.0.0.1:1", "tcp://127.0.0.1:1#short", "ipc:///tmp/x#KEY", "tcp://evil.org:1#KEY",
        "tcp://127.0.0.1;127.0.0.1:1#KEY"}) {
    PeerSpec spec = reader->Spec("owner");
    std::string text = worker;
    if (const size_t at = text.find("KEY"); at != std::string::npos) text.replace(at, 3, key);
    spec.address =
        StripedAddress{{PackedAddress{"zmq-curve", spec.incarnation, text}.Encode()}}.Encode();
    const auto peer = reader->Connect(spec);
    ASSERT_FALSE(peer.has_value()) << text;
    EXPECT_EQ(peer.error().code(), Code::kInvalidArgument) << text;
  }
  PeerSpec spec = reader->Spec("owner");
  spec.address =
      StripedAddress{{PackedAddress{"ucx 1.22.0", spec.incarnation, "x"}.Encode()}}.Encode();
  const auto peer = reader->Connect(spec);
  ASSERT_FALSE(peer.has_value());
  EXPECT_EQ(peer.error().code(), Code::kIncompatible);
}

// A good message of a stream that is waited for, from somebody without CURVE.
TEST(ZmqPacked, NothingComesInWithoutCurve) {
  const auto reader = Start(nullptr);
  const PeerSpec self = reader->Spec("itself");
  const auto peer = reader->Connect(self);
  ASSERT_TRUE(peer.has_value()) << peer.error().ToString();

  PackedHeader header;
  header.kind = PackedKind::kStopped;
  header.stream = 1;
  header.sender = self.incarnation;
  Seal(header);
  void* const context = zmq_ctx_new();
  void* const plain = zmq_socket(context, ZMQ_PUSH);
  const int zero = 0;
  zmq_setsockopt(plain, ZMQ_LINGER, &zero, sizeof(zero));
  const StripedAddress rails = *StripedAddress::Decode(self.address);
  const PackedAddress address = *PackedAddress::Decode(rails.rails[0]);
  const KeyedEndpoint at = *KeyedEndpoint::FromText(address.worker);
  ASSERT_EQ(zmq_connect(plain, at.endpoint.c_str()), 0);
  zmq_send(plain, &header, sizeof(header), ZMQ_SNDMORE | ZMQ_DONTWAIT);
  zmq_send(plain, "", 0, ZMQ_DONTWAIT);

  const Completion got = reader->Await([&](Done done) {
    return reader->transport().StartPackedReceive(*peer, 1, ReceivePlan(kChunks, kChunk),
                                                  Lease(self, 0), In(milliseconds(500)),
                                                  std::move(done));
  });
  EXPECT_EQ(got.status.code(), Code::kDeadlineExceeded) << got.status.ToString();
  zmq_close(plain);
  zmq_ctx_term(context);
}

TEST(ZmqPacked, KeysAsText) {
  const CurveKey key = New()->public_key;
  EXPECT_EQ(KeyToText(key).size(), 43U);
  EXPECT_EQ(*KeyFromText(KeyToText(key)), key);
  for (const std::string& bad : {std::string(), std::string("abc"), std::string("ä"),
                                 std::string("!!!!!!!!!!!!!!!!!!!!!!!!!!!!!!!!!!!!!!!!!!!")}) {
    EXPECT_EQ(KeyFromText(bad).error().code(), Code::kInvalidArgument) << bad;
  }
  EXPECT_FALSE(KeyFromText(KeyToText(key) + "A").has_value());
  EXPECT_EQ(KeyedEndpoint::FromText("tcp://h:1")->key, std::nullopt);
  const KeyedEndpoint at{.endpoint = "tcp://h:1", .key = key};
  EXPECT_EQ(KeyedEndpoint::FromText(at.ToText())->key, key);
  EXPECT_EQ(KeyedEndpoint::FromText(at.ToText())->endpoint, "tcp://h:1");
}

}  // namespace
}  // namespace kvrelay::transport
