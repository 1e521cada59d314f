// What a UCX rail does when processes die or stop, leases end, and peers send nonsense.
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <ucp/api/ucp.h>

#include <csignal>
#include <cstring>
#include <iostream>
#include <optional>
#include <string>
#include <vector>

#include "tests/transport/ucx_rail_fixture.h"
#include "transport/packed_wire.h"
#include "transport/ucx_endpoint.h"
#include "transport/ucx_worker.h"

namespace kvrelay::transport {
namespace {

using UcxRailFaultsTest = UcxRailTest;
using testing::HasSubstr;

TEST_F(UcxRailFaultsTest, KilledOwnerFailsItsStreamsAtOnce) {
  const auto owner = StartOwner(3);
  Node reader("ucx-rail", "", kKvBytes);
  bool dead = false;
  const auto peer = reader.Connect(spec_, [&] { dead = true; });
  ASSERT_TRUE(peer.has_value()) << peer.error().ToString();
  std::optional<Completion> done;
  // The owner is never asked to send the last of it: a stream in the middle of which it dies.
  reader.transport().StartPackedReceive(*peer, 1, ReceivePlan(kAllChunks, kChunk), Lease(spec_, 0),
                                        In(seconds(60)),
                                        [&](Completion c) { done = std::move(c); });
  reader.transport().StartPackedReceive(*peer, 2, ReceivePlan(1, kChunk), Lease(spec_, 0),
                                        In(seconds(60)),
                                        [&](const Completion& c) { EXPECT_FALSE(c.status.ok()); });
  owner->Send(SendLine(reader, 1, kAllChunks));
  reader.control().RunFor(milliseconds(5));
  owner->KillAndWait();
  ASSERT_TRUE(reader.control().RunUntil([&] { return dead; }, seconds(2)));
  ASSERT_TRUE(done.has_value());
  EXPECT_THAT(done->status.code(), testing::AnyOf(Code::kPeerUnreachable, Code::kOk));
  std::cout << "after " << done->bytes / kChunk << " of " << kAllChunks
            << " chunks: " << done->status.ToString() << '\n';

  // The same reader works with the next owner.
  const auto next = StartOwner(4);
  const auto again = reader.Connect(spec_);
  ASSERT_TRUE(again.has_value()) << again.error().ToString();
  const Completion good = Receive(reader, *again, 3, kAllChunks, Lease(spec_, 0),
                                  [&] { next->Send(SendLine(reader, 3, kAllChunks)); });
  ASSERT_TRUE(good.status.ok()) << good.status.ToString();
  EXPECT_EQ(reader.FirstWrong(4, kKvBytes), std::nullopt);
}

TEST_F(UcxRailFaultsTest, StoppedOwnerCostsADeadlineAndLateChunksAreDropped) {
  const auto owner = StartOwner(3);
  Node reader("ucx-rail", "", kKvBytes);
  const auto peer = reader.Connect(spec_);
  ASSERT_TRUE(peer.has_value());
  owner->Signal(SIGSTOP);
  std::memset(reader.kv(), 0x5a, kKvBytes);
  const TimePoint begin = In(seconds(0));
  const Completion late = Receive(
      reader, *peer, 1, 8, Lease(spec_, 0), [&] { owner->Send(SendLine(reader, 1, 8)); },
      milliseconds(200));
  EXPECT_EQ(late.status.code(), Code::kDeadlineExceeded) << late.status.ToString();
  EXPECT_THAT(late.status.message(), HasSubstr("0 of 8 chunks"));
  EXPECT_LT(In(seconds(0)) - begin, seconds(2));
  // A new peer does not wait for it for ever either.
  Node second("ucx-rail", "", 1 << 20);
  const auto refused = second.Connect(
      spec_, [] {}, milliseconds(200));
  ASSERT_FALSE(refused.has_value());
  EXPECT_EQ(refused.error().code(), Code::kDeadlineExceeded) << refused.error().ToString();

  // It goes on and sends what nobody wants any more.
  owner->Signal(SIGCONT);
  EXPECT_EQ(owner->Receive(), "sent kOk");
  EXPECT_TRUE(
      reader.control().RunUntil([&] { return CountersOf(reader)["dropped_messages"] == 8; }));
  for (uint64_t i = 0; i < 8 * kChunk; ++i) ASSERT_EQ(reader.kv()[i], std::byte{0x5a});
}

TEST_F(UcxRailFaultsTest, LeaseThatEndsInMidStreamIsAStaleReadOnBothSides) {
  Node owner("ucx-rail", "", kKvBytes);
  Node reader("ucx-rail", "", kKvBytes);
  owner.Fill(1);
  owner.StartLease(0);
  std::memset(reader.kv(), 0x5a, kKvBytes);
  const auto peer = reader.Connect(owner.Spec("owner"));
  ASSERT_TRUE(peer.has_value());
  StreamPlan plan = SendPlan(20, kChunk);
  plan.plan_chunk = [&owner, inner = plan.plan_chunk](uint32_t chunk) {
    if (chunk == 5) owner.record(0)->End();
    return inner(chunk);
  };
  std::optional<Completion> sent;
  const Completion received = Receive(reader, *peer, 1, 20, Lease(owner.Spec(""), 0), [&] {
    owner.transport().StartPackedSend(reader.Spec("reader"), 1, plan, owner.record(0),
                                      Lease(owner.Spec(""), 0), In(seconds(20)),
                                      [&](Completion c) { sent = std::move(c); });
  });
  EXPECT_EQ(received.status.code(), Code::kStaleRead) << received.status.ToString();
  EXPECT_EQ(received.bytes, 5 * kChunk);
  ASSERT_TRUE(owner.control().RunUntil([&] { return sent.has_value(); }));
  EXPECT_EQ(sent->status.code(), Code::kStaleRead) << sent->status.ToString();
  EXPECT_FALSE(GuardHolds(Lease(owner.Spec(""), 0), sent->before, sent->after));
  EXPECT_EQ(reader.FirstWrong(1, 5 * kChunk), std::nullopt);
  for (uint64_t i = 5 * kChunk; i < 20 * kChunk; ++i) ASSERT_EQ(reader.kv()[i], std::byte{0x5a});
}

TEST_F(UcxRailFaultsTest, ReaderThrowsAwayAnotherLeasesChunks) {
  Node owner("ucx-rail", "", kKvBytes);
  Node reader("ucx-rail", "", kKvBytes);
  owner.Fill(1);
  owner.StartLease(0);
  std::memset(reader.kv(), 0x5a, kKvBytes);
  const auto peer = reader.Connect(owner.Spec("owner"));
  ASSERT_TRUE(peer.has_value());
  // The owner believes that it serves lease 0; the reader was promised lease 1.
  const Completion received = Receive(reader, *peer, 1, 3, Lease(owner.Spec(""), 1), [&] {
    owner.transport().StartPackedSend(reader.Spec("reader"), 1, SendPlan(3, kChunk),
                                      owner.record(0), Lease(owner.Spec(""), 0), In(seconds(20)),
                                      [](const Completion&) {});
  });
  EXPECT_EQ(received.status.code(), Code::kStaleRead);
  EXPECT_EQ(received.bytes, 0U);
  for (uint64_t i = 0; i < 3 * kChunk; ++i) ASSERT_EQ(reader.kv()[i], std::byte{0x5a});
}

TEST_F(UcxRailFaultsTest, SidesThatCutDifferentlyFailClearly) {
  Node owner("ucx-rail", "", kKvBytes);
  Node reader("ucx-rail", "", kKvBytes);
  owner.StartLease(0);
  const auto peer = reader.Connect(owner.Spec("owner"));
  ASSERT_TRUE(peer.has_value());
  const auto exchange = [&](StreamId id, const StreamPlan& send) {
    std::optional<Completion> sent;
    Completion received = Receive(
        reader, *peer, id, 4, Lease(owner.Spec(""), 0),
        [&] {
          owner.transport().StartPackedSend(reader.Spec("reader"), id, send, owner.record(0),
                                            Lease(owner.Spec(""), 0), In(seconds(20)),
                                            [&](Completion c) { sent = std::move(c); });
        },
        milliseconds(500));
    EXPECT_TRUE(owner.control().RunUntil([&] { return sent.has_value(); }));
    return std::pair(received.status, sent->status);
  };
  EXPECT_EQ(exchange(1, SendPlan(5, kChunk)).first.code(), Code::kInternal);
  EXPECT_EQ(exchange(2, SendPlan(4, kChunk / 2)).first.code(), Code::kInternal);
  // What the owner refuses before it sends anything.
  EXPECT_EQ(exchange(3, SendPlan(4, kChunk + 1)).second.code(), Code::kInvalidArgument);
  EXPECT_EQ(exchange(4, SendPlan(0, kChunk)).second.code(), Code::kInvalidArgument);
  // A plan that leaves the owner's region: the reader hears of it.
  StreamPlan beyond = SendPlan(4, kChunk);
  beyond.plan_chunk = [inner = beyond.plan_chunk](uint32_t chunk) {
    auto plan = inner(chunk);
    if (chunk == 2) plan->places[0].src_offset = kKvBytes - 8;
    return plan;
  };
  const auto [received, sent] = exchange(5, beyond);
  EXPECT_EQ(received.code(), Code::kPeerUnreachable) << received.ToString();
  EXPECT_THAT(received.message(), HasSubstr("stopped the stream after 2 of 4 chunks"));
  EXPECT_EQ(sent.code(), Code::kInvalidArgument) << sent.ToString();
  // Nothing of that breaks the way.
  EXPECT_TRUE(exchange(6, SendPlan(4, kChunk)).first.ok());
}

TEST_F(UcxRailFaultsTest, ForeignMessagesAreCountedAndHarmless) {
  Node reader("ucx-rail", "", kKvBytes);
  const auto address = PackedAddress::Decode(reader.Spec("").address);
  ASSERT_TRUE(address.has_value());
  auto context = UcxContext::CreatePacked({.interface = "lo", .message_bytes = kChunk});
  ASSERT_TRUE(context.has_value()) << context.error().ToString();
  auto worker = UcxWorker::Create(*context);
  ASSERT_TRUE(worker.has_value());
  ASSERT_TRUE((*worker)->Receive([](auto, auto) {}, [] {}).ok());
  auto endpoint = UcxEndpoint::Create(**worker, address->worker);
  ASSERT_TRUE(endpoint.has_value());
  int pending = 0;
  const auto send = [&](std::span<const std::byte> header, std::span<const std::byte> data) {
    ++pending;
    (*endpoint)->Send(header, data, [&](const Status&) { --pending; });
    while (pending > 0) (*worker)->Progress();
  };
  const std::vector<std::byte> bytes(1000, std::byte{0x77});
  send({}, bytes);
  send(std::span(bytes).first(120), bytes);
  send(std::span(bytes).first(500), {});
  PackedHeader header;
  header.kind = PackedKind::kChunk;
  header.bytes = 7;  // but a thousand come
  Seal(header);
  send(std::as_bytes(std::span(&header, 1)), bytes);
  header.bytes = bytes.size();
  Seal(header);
  header.chunk ^= 1;  // damaged on the way
  send(std::as_bytes(std::span(&header, 1)), bytes);
  header.chunk = 0;
  header.kind = static_cast<PackedKind>(99);
  Seal(header);
  send(std::as_bytes(std::span(&header, 1)), bytes);
  header.kind = PackedKind::kPing;  // with an address that is none
  Seal(header);
  send(std::as_bytes(std::span(&header, 1)), bytes);
  // A rendezvous: UCX asks us where to put it, and we do not answer that.
  ucp_ep_params_t ep_params{};
  ep_params.field_mask = UCP_EP_PARAM_FIELD_REMOTE_ADDRESS;
  ep_params.address = reinterpret_cast<const ucp_address_t*>(address->worker.data());
  ucp_ep_h raw = nullptr;
  ASSERT_EQ(ucp_ep_create((*worker)->get(), &ep_params, &raw), UCS_OK);
  ucp_request_param_t param{};
  param.op_attr_mask = UCP_OP_ATTR_FIELD_FLAGS;
  param.flags = UCP_AM_SEND_FLAG_RNDV;
  const std::vector<std::byte> large(1 << 20);
  const auto request =
      ucp_am_send_nbx(raw, kUcxMessageId, bytes.data(), 120, large.data(), large.size(), &param);
  EXPECT_TRUE(reader.control().RunUntil([&] {
    (*worker)->Progress();
    return CountersOf(reader)["bad_messages"] == 8;
  })) << CountersOf(reader)["bad_messages"];
  if (UCS_PTR_IS_PTR(request)) {
    EXPECT_TRUE(reader.control().RunUntil([&] {
      (*worker)->Progress();
      return ucp_request_check_status(request) != UCS_INPROGRESS;
    }));
    ucp_request_free(request);
  }
  // A chunk of a stream that nobody expects.
  header.kind = PackedKind::kChunk;
  Seal(header);
  send(std::as_bytes(std::span(&header, 1)), bytes);
  EXPECT_TRUE(reader.control().RunUntil([&] {
    (*worker)->Progress();
    return CountersOf(reader)["dropped_messages"] == 1;
  }));
  param.flags = UCP_EP_CLOSE_FLAG_FORCE;
  const auto closing = ucp_ep_close_nbx(raw, &param);
  while (UCS_PTR_IS_PTR(closing) && ucp_request_check_status(closing) == UCS_INPROGRESS) {
    (*worker)->Progress();
  }
  if (UCS_PTR_IS_PTR(closing)) ucp_request_free(closing);
  (*endpoint)->Close();
  while (!(*endpoint)->finished()) (*worker)->Progress();

  const auto owner = StartOwner(3);
  const auto peer = reader.Connect(spec_);
  ASSERT_TRUE(peer.has_value());
  EXPECT_TRUE(Receive(reader, *peer, 1, 4, Lease(spec_, 0), [&] {
                owner->Send(SendLine(reader, 1, 4));
              }).status.ok());
}

TEST_F(UcxRailFaultsTest, KilledReaderFreesTheOwnersSide) {
  Node owner("ucx-rail", "", kKvBytes);
  owner.StartLease(0);
  for (const bool stopped : {false, true}) {
    // The other process is the reader now: it expects nothing and drops what comes.
    const auto reader = StartOwner(1);
    if (stopped) reader->Signal(SIGSTOP);
    std::optional<Completion> done;
    StreamPlan endless = SendPlan(1, kChunk);
    endless.chunks = 1'000'000;
    endless.plan_chunk = [inner = endless.plan_chunk](uint32_t) { return inner(0); };
    owner.transport().StartPackedSend(spec_, 1, endless, owner.record(0), Lease(owner.Spec(""), 0),
                                      In(seconds(60)), [&](Completion c) { done = std::move(c); });
    owner.control().RunFor(milliseconds(100));
    ASSERT_FALSE(done.has_value()) << done->status.ToString();
    reader->KillAndWait();
    ASSERT_TRUE(owner.control().RunUntil([&] { return done.has_value(); }, seconds(5)));
    EXPECT_EQ(done->status.code(), Code::kPeerUnreachable) << done->status.ToString();
    EXPECT_TRUE(owner.control().RunUntil([&] {
      const auto counters = CountersOf(owner);
      return counters.at("slots_in_use") == 0 && counters.at("closing_connections") == 0;
    }));
  }
}

TEST_F(UcxRailFaultsTest, StoppedReaderDoesNotStarveOthers) {
  Node owner("ucx-rail", "", kKvBytes);
  owner.Fill(9);
  owner.StartLease(0);
  Node reader("ucx-rail", "", kKvBytes);
  const auto peer = reader.Connect(owner.Spec("owner"));
  ASSERT_TRUE(peer.has_value());
  std::vector<std::unique_ptr<Child>> stopped;
  int ended = 0;
  for (int i = 0; i < 3; ++i) {
    stopped.push_back(StartOwner(1));
    StreamPlan endless = SendPlan(1, kChunk);
    endless.chunks = 1'000'000;
    endless.plan_chunk = [inner = endless.plan_chunk](uint32_t) { return inner(0); };
    stopped.back()->Signal(SIGSTOP);
    owner.transport().StartPackedSend(spec_, 1, endless, owner.record(0), Lease(owner.Spec(""), 0),
                                      In(seconds(3)), [&](const Completion& c) {
                                        EXPECT_FALSE(c.status.ok());
                                        std::cout << "stopped reader: " << c.status.ToString()
                                                  << '\n';
                                        ++ended;
                                      });
  }
  owner.control().RunFor(milliseconds(300));
  // Readers that take nothing hold all slots for a second at most.
  const Completion good = Receive(reader, *peer, 5, kAllChunks, Lease(owner.Spec(""), 0), [&] {
    owner.transport().StartPackedSend(reader.Spec("reader"), 5, SendPlan(kAllChunks, kChunk),
                                      owner.record(0), Lease(owner.Spec(""), 0), In(seconds(20)),
                                      [](const Completion&) {});
  });
  ASSERT_TRUE(good.status.ok()) << good.status.ToString();
  EXPECT_EQ(reader.FirstWrong(9, kKvBytes), std::nullopt);
  ASSERT_TRUE(owner.control().RunUntil([&] { return ended == 3; }, seconds(8)));
  EXPECT_TRUE(
      owner.control().RunUntil([&] { return CountersOf(owner)["slots_in_use"] == 0; }, seconds(5)));
}

}  // namespace
}  // namespace kvrelay::transport
