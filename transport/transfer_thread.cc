#include "transport/transfer_thread.h"

#include <glog/logging.h>
#include <pthread.h>

#include <csignal>
#include <cstdint>
#include <utility>

namespace kvrelay::transport {

Result<std::unique_ptr<TransferThread>> TransferThread::Create(std::string name, Duration spin) {
  KVRELAY_ASSIGN_OR_RETURN(std::unique_ptr<EventLoop> loop, EventLoop::Create());
  std::unique_ptr<TransferThread> thread(
      new TransferThread(std::move(name), spin, std::move(loop)));
  KVRELAY_RETURN_IF_ERROR(thread->loop_->Watch(thread->queue_.fd(), EPOLLIN, [](uint32_t) {}));
  return thread;
}

// Without a bound: what is posted is bounded by its posters (operations are counted), and an order
// to cancel must never be lost.
TransferThread::TransferThread(std::string name, Duration spin, std::unique_ptr<EventLoop> loop)
    : name_(std::move(name)), spin_(spin), loop_(std::move(loop)), queue_(SIZE_MAX) {}

void TransferThread::Stop() {
  if (!thread_.joinable()) return;
  Post([this] { stopping_ = true; });
  thread_.join();
}

void TransferThread::Post(Task task) { CHECK(queue_.Push(std::move(task))); }

void TransferThread::Start(Worker& worker) {
  sigset_t all;
  sigset_t before;
  sigfillset(&all);
  pthread_sigmask(SIG_SETMASK, &all, &before);  // inherited by the new thread
  thread_ = std::thread([this, &worker] { Run(worker); });
  pthread_sigmask(SIG_SETMASK, &before, nullptr);
  pthread_setname_np(thread_.native_handle(), name_.c_str());
}

void TransferThread::Run(Worker& worker) {
  TimePoint last_activity = EventLoop::Now();
  while (!stopping_) {
    const bool ran = RunTasks();
    loop_->Poll(std::nullopt);
    const TimePoint now = EventLoop::Now();
    const TimePoint next = worker.Work(now);
    if (ran || next == Worker::kBusy) {
      last_activity = now;
    } else if (queue_.ApproximateSize() == 0 && now - last_activity >= spin_ &&
               worker.PrepareToSleep()) {
      loop_->Poll(next);
      last_activity = EventLoop::Now() - spin_;  // waking is no activity by itself
    }
  }
  worker.Finish();
}

bool TransferThread::RunTasks() {
  if (queue_.ApproximateSize() == 0) return false;
  tasks_.clear();
  queue_.DrainInto(tasks_);
  for (Task& task : tasks_) task();
  tasks_.clear();
  return true;
}

}  // namespace kvrelay::transport
