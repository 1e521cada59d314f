// The way to the thread that owns something: a bounded queue whose descriptor wakes its consumer.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <deque>
#include <mutex>
#include <utility>
#include <vector>

#include "base/unique_fd.h"

namespace kvrelay {

namespace internal {
// A non-blocking, CLOEXEC eventfd. Aborts when no descriptor is left: queues are made at start-up.
UniqueFd MakeEventFd();
void SignalEventFd(int fd);
void ClearEventFd(int fd);
}  // namespace internal

// Push: any thread. DrainInto: one thread, the consumer. First in, first out.
template <typename T>
class WakeQueue {
 public:
  explicit WakeQueue(size_t capacity) : capacity_(capacity), fd_(internal::MakeEventFd()) {}
  WakeQueue(const WakeQueue&) = delete;
  WakeQueue& operator=(const WakeQueue&) = delete;

  // False, and `item` is dropped, when the queue holds `capacity` items: the caller answers
  // kOverloaded. Never blocks for longer than the other side needs to move items.
  [[nodiscard]] bool Push(T item) {
    const std::lock_guard lock(mutex_);
    if (items_.size() >= capacity_) return false;
    items_.push_back(std::move(item));
    size_.store(items_.size(), std::memory_order_release);
    // Only the item that ends emptiness signals: a busy queue costs no system call. Under the lock,
    // as below: a signal that came after its item was taken would keep the consumer from sleeping.
    if (items_.size() == 1) internal::SignalEventFd(fd_.get());
    return true;
  }

  // Appends at most `limit` items to `out`; returns how many.
  size_t DrainInto(std::vector<T>& out, size_t limit = SIZE_MAX) {
    const std::lock_guard lock(mutex_);
    size_t taken = 0;
    for (; taken < limit && !items_.empty(); ++taken) {
      out.push_back(std::move(items_.front()));
      items_.pop_front();
    }
    size_.store(items_.size(), std::memory_order_release);
    if (taken > 0 && items_.empty()) internal::ClearEventFd(fd_.get());
    return taken;
  }

  // Readable while items wait, and only then: for epoll and zmq_poll.
  int fd() const { return fd_.get(); }

  // Without a lock, for a consumer that spins before it sleeps; may be out of date at once.
  size_t ApproximateSize() const { return size_.load(std::memory_order_acquire); }

 private:
  const size_t capacity_;
  const UniqueFd fd_;
  std::mutex mutex_;
  std::deque<T> items_;          // under mutex_
  std::atomic<size_t> size_{0};  // items_.size(), written under mutex_
};

}  // namespace kvrelay
