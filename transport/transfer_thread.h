// The one thread of a transport. It runs what other threads post, watches descriptors, and calls
// its worker again and again while there is work; after the last activity it spins for a bounded
// time and then sleeps.
#pragma once

#include <functional>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#include "base/clock.h"
#include "base/status.h"
#include "base/wake_queue.h"
#include "transport/event_loop.h"

namespace kvrelay::transport {

class TransferThread {
 public:
  using Task = std::function<void()>;

  // What the thread does for its transport. All calls on the thread.
  class Worker {
   public:
    static constexpr TimePoint kBusy = TimePoint::min();

    // Does one bounded piece of work (about a millisecond). Returns when it wants to be called
    // again at the latest: kBusy for at once, because something was done or is left to do;
    // TimePoint::max() for when something else happens.
    virtual TimePoint Work(TimePoint now) = 0;
    // About to sleep: false when something has arrived meanwhile.
    virtual bool PrepareToSleep() { return true; }
    // The last call: everything that is open ends here.
    virtual void Finish() = 0;

   protected:
    ~Worker() = default;
  };

  // `name`: at most 15 characters, shown by tools like top. The loop may be used from the creating
  // thread until Start.
  static Result<std::unique_ptr<TransferThread>> Create(std::string name, Duration spin);
  ~TransferThread() { Stop(); }

  EventLoop& loop() { return *loop_; }
  // `worker` outlives the thread. Signals go to other threads.
  void Start(Worker& worker);
  // Returns once the worker's Finish has returned. Does nothing when it was not started, or has
  // stopped. The worker calls it in its own destructor: it must still be whole when Finish runs.
  void Stop();
  // Any thread. Tasks run in order; those posted before Stop all run.
  void Post(Task task);

 private:
  TransferThread(std::string name, Duration spin, std::unique_ptr<EventLoop> loop);
  void Run(Worker& worker);
  bool RunTasks();

  const std::string name_;
  const Duration spin_;
  const std::unique_ptr<EventLoop> loop_;
  WakeQueue<Task> queue_;
  std::vector<Task> tasks_;
  bool stopping_ = false;  // on the thread
  std::thread thread_;
};

}  // namespace kvrelay::transport
