// Says in code, and checks in debug builds, which thread may call.
#pragma once

#include <atomic>
#include <thread>

namespace kvrelay {

// A member of the object that belongs to one thread. It binds to the thread of the first check, so
// that objects may be built on another thread; Detach() unbinds it for a hand-over (a queue or a
// lock orders the hand-over itself).
//
//   void Session::Advance() {
//     KVRELAY_DCHECK_THREAD(control_thread_);
class ThreadChecker {
 public:
  bool CalledOnItsThread() const {
    std::thread::id owner;  // no thread
    const std::thread::id self = std::this_thread::get_id();
    return owner_.compare_exchange_strong(owner, self, std::memory_order_relaxed) || owner == self;
  }
  void Detach() { owner_.store(std::thread::id(), std::memory_order_relaxed); }

 private:
  mutable std::atomic<std::thread::id> owner_;
};

// Logs and aborts.
[[noreturn]] void FailThreadCheck(const char* checker, const char* function);

}  // namespace kvrelay

// Aborts, naming the checker and the function, when another thread than the checker's calls.
// Nothing with NDEBUG.
#ifndef NDEBUG
#define KVRELAY_DCHECK_THREAD(checker)                           \
  do {                                                           \
    if (!(checker).CalledOnItsThread()) {                        \
      ::kvrelay::FailThreadCheck(#checker, __PRETTY_FUNCTION__); \
    }                                                            \
  } while (false)
#else
#define KVRELAY_DCHECK_THREAD(checker) \
  do {                                 \
  } while (false)
#endif
