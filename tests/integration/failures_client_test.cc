// Clients that leave, and daemons that have no room.
#include <gmock/gmock.h>

#include <csignal>

#include "tests/integration/failure_story.h"

namespace kvrelay::integration {
namespace {

using ::testing::HasSubstr;

class ClientLeaves : public FailureStory {
 protected:
  double Cancelled(const Daemon& daemon, const std::string& role) {
    return Count(daemon, "kvrelay_requests_total{role=\"" + role + "\",outcome=\"kCancelled\"}");
  }
};

TEST_F(ClientLeaves, KilledWhileThePrefillComputesBothDaemonsDropTheRequest) {
  Daemon& prefill = StartPrefill({kSlowPrefill});
  Daemon& decode = StartDecode({&prefill});
  const RunningCli asking = StartGenerate(decode, Ask(1800, 8));
  ASSERT_TRUE(Eventually("claimed", [&] { return HasLease(prefill, "claimed"); }));
  asking.Signal(SIGKILL);
  Eventually("decode drops it", [&] { return Cancelled(decode, "decode") == 1; });
  Eventually("prefill drops it", [&] { return Cancelled(prefill, "prefill") == 1; });
  ExpectIdle(decode);
  ExpectIdle(prefill);
  ExpectServes(decode);
}

TEST_F(ClientLeaves, KilledWhileTextStreamsTheBlocksAreFree) {
  Daemon& prefill = StartPrefill();
  Daemon& decode = StartDecode({&prefill}, {"--threads=1"});
  const RunningCli asking = StartGenerate(decode, Ask(100, 1900));
  ASSERT_TRUE(Eventually("it decodes", [&] { return Count(decode, "kvrelay_pulls_total") == 1; }));
  asking.Signal(SIGKILL);
  Eventually("decode drops it", [&] { return Cancelled(decode, "decode") == 1; });
  ExpectIdle(decode);
  ExpectIdle(prefill);
}

TEST_F(ClientLeaves, ControlCExitsWith130AndCancelsOnBothDaemons) {
  Daemon& prefill = StartPrefill({kSlowPrefill});
  Daemon& decode = StartDecode({&prefill});
  RunningCli asking = StartGenerate(decode, Ask(1800, 8));
  ASSERT_TRUE(Eventually("claimed", [&] { return HasLease(prefill, "claimed"); }));
  asking.Signal(SIGINT);
  ExpectFailure(asking.Wait(), 130, "kCancelled");
  Eventually("decode drops it", [&] { return Cancelled(decode, "decode") == 1; });
  Eventually("prefill drops it", [&] { return Cancelled(prefill, "prefill") == 1; });
  ExpectIdle(decode);
  ExpectIdle(prefill);
}

TEST_F(ClientLeaves, ADeadlineEndsTheRequestOnBothDaemons) {
  Daemon& prefill = StartPrefill({kSlowPrefill});
  Daemon& decode = StartDecode({&prefill});
  const CliResult result = RunGenerate(decode, Ask(1800, 8), {"--timeout_ms=700"});
  ExpectFailure(result, 3, "kDeadlineExceeded");
  ExpectIdle(decode);
  ExpectIdle(prefill);
  EXPECT_EQ(Count(prefill, "kvrelay_requests_total{role=\"prefill\",outcome=\"ok\"}"), 0);
}

TEST_F(ClientLeaves, OthersGoOn) {
  Daemon& prefill = StartPrefill();
  Daemon& decode = StartDecode({&prefill}, {"--tp=2"});
  std::vector<RunningCli> staying;
  std::vector<RunningCli> leaving;
  for (int i = 0; i < 4; ++i) {
    staying.push_back(StartGenerate(decode, Ask(150, 60, i)));
    leaving.push_back(StartGenerate(decode, Ask(150, 800, 10 + i)));
  }
  ASSERT_TRUE(Eventually("all are here", [&] {
    return Count(decode, "kvrelay_pulls_total{path=\"mapped\",outcome=\"ok\"}") >= 16;  // two ranks
  }));
  for (const RunningCli& cli : leaving) cli.Signal(SIGKILL);
  for (int i = 0; i < 4; ++i) ExpectRightAnswer(staying[i].Wait(), Ask(150, 60, i));
  ExpectIdle(decode);
  ExpectIdle(prefill);
}

class NoRoom : public FailureStory {};

TEST_F(NoRoom, WhatNeverFitsIsTooLargeAtOnceWithBothNumbers) {
  Daemon& prefill = StartPrefill();
  Daemon& decode = StartDecode({&prefill}, {"--kv_blocks=20"});
  const CliResult result = RunGenerate(decode, Ask(400, 64));
  ExpectFailure(result, 2, "kTooLarge");
  // 401 prompt tokens with the beginning of the document and 63 of the answer that are run.
  EXPECT_THAT(Message(result), HasSubstr("29 blocks"));
  EXPECT_THAT(Message(result), HasSubstr("the cache has 20"));
  EXPECT_EQ(Count(prefill, "kvrelay_requests_total"), 0) << "nobody was asked for it";
  ExpectServes(decode);
  ExpectIdle(decode);
}

TEST_F(NoRoom, WhatNeverFitsThePrefillIsTooLargeWithBothNumbers) {
  Daemon& prefill = StartPrefill({"--kv_blocks=20"});
  Daemon& decode = StartDecode({&prefill});
  const CliResult result = RunGenerate(decode, Ask(400, 8));
  ExpectFailure(result, 2, "kTooLarge");
  EXPECT_THAT(Message(result), HasSubstr("26 blocks"));
  EXPECT_THAT(Message(result), HasSubstr("the cache has 20"));
  ExpectServes(decode);
  ExpectIdle(decode);
  ExpectIdle(prefill);
}

// Room for about two requests at a time, on either side in turn.
TEST_F(NoRoom, WhatFitsLaterWaitsAndAllEndRight) {
  for (const bool on_prefill : {false, true}) {
    Daemon& prefill = StartPrefill(on_prefill ? Args{"--kv_blocks=40"} : Args{});
    Daemon& decode = StartDecode({&prefill}, on_prefill ? Args{} : Args{"--kv_blocks=40"});
    std::vector<RunningCli> asking;
    for (int i = 0; i < 8; ++i) asking.push_back(StartGenerate(decode, Ask(200, 32, i)));
    for (int i = 0; i < 8; ++i) ExpectRightAnswer(asking[i].Wait(), Ask(200, 32, i));
    ExpectIdle(decode);
    ExpectIdle(prefill);
  }
}

TEST_F(NoRoom, AFullQueueIsOverloadedAtOnce) {
  Daemon& prefill = StartPrefill({kSlowPrefill});
  Daemon& decode = StartDecode({&prefill}, {"--max_batch=1", "--max_queue=1"});
  const Args first = Ask(700, 8, 1);
  const Args second = Ask(100, 8, 2);
  RunningCli running = StartGenerate(decode, first);
  ASSERT_TRUE(Eventually("it runs", [&] { return HasLease(prefill, "claimed"); }));
  RunningCli queued = StartGenerate(decode, second);
  ASSERT_TRUE(Eventually("one waits", [&] { return Count(decode, "kvrelay_queue_depth") == 1; }));
  const CliResult refused = RunGenerate(decode, Ask(100, 8, 3));
  ExpectFailure(refused, 5, "kOverloaded");
  EXPECT_THAT(Message(refused), HasSubstr("max_queue = 1"));
  ExpectRightAnswer(running.Wait(), first);
  ExpectRightAnswer(queued.Wait(), second);
  ExpectIdle(decode);
  ExpectIdle(prefill);
}

}  // namespace
}  // namespace kvrelay::integration
