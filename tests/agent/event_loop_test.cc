#include "agent/event_loop.h"

#include <gtest/gtest.h>
#include <zmq.h>

#include <atomic>
#include <string>
#include <thread>
#include <vector>

#include "base/wake_queue.h"

namespace kvrelay::agent {
namespace {

TEST(EventLoop, TimersRunInOrderOfTimeThenOfSetting) {
  EventLoop loop;
  std::string order;
  const TimePoint now = loop.Now();
  loop.CallAt(now + Millis(3), [&] { order += 'c'; });
  loop.CallAt(now + Millis(1), [&] { order += 'a'; });
  loop.CallAt(now + Millis(1), [&] { order += 'b'; });
  loop.CallAt(now + Millis(4), [&] { loop.Stop(); });
  loop.Run();
  EXPECT_EQ(order, "abc");
  EXPECT_GE(loop.Now(), now + Millis(4));
}

TEST(EventLoop, SleepsUntilATimerWithoutBeingLate) {
  EventLoop loop;
  const TimePoint due = loop.Now() + std::chrono::microseconds(2300);
  loop.CallAt(due, [&] { loop.Stop(); });
  loop.Run();
  EXPECT_GE(loop.Now(), due) << "a timer never runs early";
}

TEST(EventLoop, CancelledTimersDoNotRun) {
  EventLoop loop;
  bool ran = false;
  const TimePoint now = loop.Now();
  const Clock::TimerId first = loop.CallAt(now + Millis(2), [&] { ran = true; });
  Clock::TimerId second = 0;
  // One that is due in the same round is cancelled by the one before it.
  loop.CallAt(now, [&] { loop.Cancel(second); });
  second = loop.CallAt(now, [&] { ran = true; });
  loop.Cancel(first);
  loop.Cancel(first);
  loop.Cancel(0);
  loop.CallAt(now + Millis(4), [&] { loop.Stop(); });
  loop.Run();
  EXPECT_FALSE(ran);
}

TEST(EventLoop, ATimerThatSetsItselfForThePastStarvesNobody) {
  EventLoop loop;
  int rounds = 0;
  std::function<void()> again = [&] {
    ++rounds;
    loop.CallAt(TimePoint{}, again);
  };
  again();
  loop.CallAfter(Millis(2), [&] { loop.Stop(); });
  loop.Run();
  EXPECT_GT(rounds, 1);
}

TEST(EventLoop, PostedClosuresComeFromAllThreadsInOrder) {
  EventLoop loop;
  constexpr int kThreads = 4;
  constexpr int kEach = 2000;
  std::vector<int> next(kThreads, 0);
  int total = 0;
  std::vector<std::thread> threads;
  for (int t = 0; t < kThreads; ++t) {
    threads.emplace_back([&, t] {
      for (int i = 0; i < kEach; ++i) {
        loop.Post([&, t, i] {
          EXPECT_EQ(next[t]++, i);
          if (++total == kThreads * kEach) loop.Stop();
        });
      }
    });
  }
  loop.Run();
  for (auto& thread : threads) thread.join();
  EXPECT_EQ(total, kThreads * kEach);
}

TEST(EventLoop, StopBeforeRunReturnsAtOnceAndRunAgainWorks) {
  EventLoop loop;
  loop.Stop();
  loop.Run();
  bool ran = false;
  loop.Post([&] {
    ran = true;
    loop.Stop();
  });
  loop.Run();
  EXPECT_TRUE(ran);
}

TEST(EventLoop, WakesForADescriptorAsLongAsItIsReadable) {
  EventLoop loop;
  const UniqueFd fd = internal::MakeEventFd();
  int calls = 0;
  EventLoop::WatchId watch = 0;
  watch = loop.WatchFd(fd.get(), [&] {
    if (++calls < 3) return;  // left readable: called again
    loop.Unwatch(watch);
    loop.CallAfter(Millis(2), [&] { loop.Stop(); });
  });
  std::thread writer([&] {
    std::this_thread::sleep_for(Millis(2));  // the loop sleeps by then
    internal::SignalEventFd(fd.get());
  });
  loop.Run();
  writer.join();
  EXPECT_EQ(calls, 3) << "not called after Unwatch";
}

TEST(EventLoop, ZmqSocketsAreServedWhileMessagesWait) {
  void* const context = zmq_ctx_new();
  void* const out = zmq_socket(context, ZMQ_PAIR);
  void* const in = zmq_socket(context, ZMQ_PAIR);
  ASSERT_EQ(zmq_bind(in, "inproc://test"), 0);
  ASSERT_EQ(zmq_connect(out, "inproc://test"), 0);
  constexpr int kMessages = 100;
  {
    EventLoop loop;
    int received = 0;
    const EventLoop::WatchId watch = loop.WatchSocket(in, [&] {
      char byte;
      // One a call: the descriptor of a ZeroMQ socket signals changes only, the loop has to look
      // again.
      ASSERT_EQ(zmq_recv(in, &byte, 1, ZMQ_DONTWAIT), 1);
      if (++received == kMessages) loop.Stop();
    });
    std::thread sender([&] {
      for (int i = 0; i < kMessages; ++i) {
        if (i % 10 == 0) std::this_thread::sleep_for(std::chrono::microseconds(300));
        zmq_send(out, "x", 1, 0);
      }
    });
    loop.Run();
    sender.join();
    loop.Unwatch(watch);
    EXPECT_EQ(received, kMessages);
  }
  zmq_close(out);
  zmq_close(in);
  zmq_ctx_term(context);
}

}  // namespace
}  // namespace kvrelay::agent
