#include "base/thread_checker.h"

#include <gtest/gtest.h>

#include <thread>

namespace kvrelay {
namespace {

bool OnAnotherThread(const ThreadChecker& checker) {
  bool result = false;
  std::thread([&] { result = checker.CalledOnItsThread(); }).join();
  return result;
}

TEST(ThreadChecker, BelongsToTheThreadOfItsFirstCheck) {
  const ThreadChecker checker;
  EXPECT_TRUE(OnAnotherThread(checker));
  EXPECT_FALSE(checker.CalledOnItsThread());
}

TEST(ThreadChecker, DetachHandsOver) {
  ThreadChecker checker;
  EXPECT_TRUE(checker.CalledOnItsThread());
  EXPECT_FALSE(OnAnotherThread(checker));
  checker.Detach();
  EXPECT_TRUE(OnAnotherThread(checker));
  EXPECT_FALSE(checker.CalledOnItsThread());
}

#ifndef NDEBUG
TEST(ThreadCheckerDeathTest, TheMacroNamesTheFunctionAndTheThread) {
  GTEST_FLAG_SET(death_test_style, "threadsafe");
  struct Session {
    void Advance() { KVRELAY_DCHECK_THREAD(control_thread); }
    ThreadChecker control_thread;
  };
  EXPECT_DEATH(
      {
        Session session;
        session.Advance();
        std::thread([&] { session.Advance(); }).join();
      },
      "Advance.*another thread than that of control_thread");
}
#endif

}  // namespace
}  // namespace kvrelay
