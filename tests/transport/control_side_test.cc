#include "transport/control_side.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <memory>
#include <string>
#include <vector>

#include "tests/transport/node.h"

namespace kvrelay::transport {
namespace {

using std::chrono::seconds;
using testing::ElementsAre;
using testing::IsEmpty;

class ControlSideTest : public testing::Test {
 protected:
  // A peer whose callbacks write down what they are told.
  PeerHandle Watch() {
    return side_.Watch(
        [this](const Result<PeerHandle>& result) {
          told_.push_back(result.has_value() ? "connected " + std::to_string(*result)
                                             : result.error().ToString());
        },
        [this] { told_.push_back("dead"); });
  }
  const std::vector<std::string>& Told() {
    control_.RunFor({});
    return told_;
  }

  Control control_;
  ControlSide side_{control_.executor()};
  std::vector<std::string> told_;
};

TEST_F(ControlSideTest, TellsOfAConnectionAndOfItsEnd) {
  const PeerHandle peer = Watch();
  side_.Connected(peer);
  side_.Lost(peer, Status(Code::kPeerUnreachable, "gone"));
  EXPECT_THAT(told_, IsEmpty()) << "never inside the call";
  EXPECT_THAT(Told(), ElementsAre("connected " + std::to_string(peer), "dead"));
}

TEST_F(ControlSideTest, TellsWhyThereIsNoConnection) {
  side_.Lost(Watch(), Status(Code::kPeerUnreachable, "nobody listens"));
  EXPECT_THAT(Told(), ElementsAre("kPeerUnreachable: nobody listens"));
}

TEST_F(ControlSideTest, AForgottenPeerIsNotHeardOfThoughTheWordIsOnItsWay) {
  const PeerHandle peer = Watch();
  const PeerHandle other = Watch();
  side_.Connected(peer);
  side_.Connected(other);
  ASSERT_EQ(Told().size(), 2U);
  side_.Lost(peer, Status(Code::kPeerUnreachable, "gone"));
  side_.Forget(peer);
  side_.Forget(peer);
  EXPECT_EQ(Told().size(), 2U);
  side_.Lost(other, Status(Code::kPeerUnreachable, "gone"));
  EXPECT_EQ(Told().back(), "dead");
}

TEST_F(ControlSideTest, CallbacksMayConnectAndDisconnect) {
  PeerHandle peer = 0;
  PeerHandle next = 0;
  peer = side_.Watch([&](const Result<PeerHandle>&) { side_.Forget(peer); },
                     [this] { told_.push_back("dead"); });
  side_.Connected(peer);
  side_.Lost(peer, Status(Code::kPeerUnreachable, "gone"));
  EXPECT_THAT(Told(), IsEmpty());
  side_.Lost(side_.Watch([&](const Result<PeerHandle>&) { next = Watch(); }, [] {}),
             Status(Code::kPeerUnreachable, "gone"));
  EXPECT_THAT(Told(), IsEmpty());
  side_.Connected(next);
  EXPECT_THAT(Told(), ElementsAre("connected " + std::to_string(next)));
}

TEST_F(ControlSideTest, WhatIsQueuedOutlivesIt) {
  std::vector<std::string> told;
  {
    ControlSide side(control_.executor());
    const PeerHandle peer = side.Watch(
        [&](const Result<PeerHandle>& result) { told.push_back(result.error().ToString()); },
        [] {});
    side.Lost(peer, Status(Code::kCancelled, "the transport is closing"));
    const OpId refused =
        side.RefuseStart([&](const Completion& c) { told.push_back(c.status.ToString()); },
                         Status(Code::kInvalidArgument, "no streams"));
    EXPECT_GT(refused, peer) << "one sequence of ids";
  }
  control_.RunFor({});
  EXPECT_THAT(told,
              ElementsAre("kCancelled: the transport is closing", "kInvalidArgument: no streams"));
}

}  // namespace
}  // namespace kvrelay::transport
