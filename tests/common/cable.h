// A cable between two isolated hosts that is long, slow, or bad: what goes over it is delayed, lost
// and held to a rate.
//
// Where the kernel has sch_netem that does it, on a veth pair. Elsewhere a process stands between
// two tap interfaces and carries every frame by itself, by the same rules. Names and addresses on
// both hosts are those of IsolatedHost::Join.
#pragma once

#include <fcntl.h>
#include <linux/if_tun.h>
#include <net/if.h>
#include <poll.h>
#include <sys/ioctl.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <chrono>
#include <csignal>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "base/clock.h"
#include "base/unique_fd.h"
#include "tests/common/isolated_host.h"

namespace kvrelay {

// In each direction.
struct CableShape {
  Duration delay{};
  uint64_t mbit_per_second = 1000;
  double loss = 0;  // fraction of the frames
};

// Frames on their way in one direction. A full one takes no more: they wait in the interface's own
// queue, which drops.
class CableLane {
 public:
  CableLane(int from, int to, const CableShape& shape, uint64_t seed)
      : from_(from), to_(to), shape_(shape), frames_(kFrames), random_(seed) {}

  // Takes what has come.
  void Receive(TimePoint now) {
    while (count_ < kFrames) {
      Frame& frame = frames_[(first_ + count_) % kFrames];
      const ssize_t bytes = read(from_, frame.data.data(), frame.data.size());
      if (bytes <= 0) return;
      free_at_ = std::max(now, free_at_) + Duration(static_cast<int64_t>(bytes) * 8000 /
                                                    static_cast<int64_t>(shape_.mbit_per_second));
      if (std::uniform_real_distribution<>()(random_) < shape_.loss) continue;
      frame.bytes = static_cast<size_t>(bytes);
      frame.due = free_at_ + shape_.delay;
      ++count_;
    }
  }
  // Hands over what is due.
  void Deliver(TimePoint now) {
    for (; count_ > 0 && frames_[first_].due <= now; --count_) {
      // An interface that is down takes none: they are lost.
      [[maybe_unused]] const ssize_t taken =
          write(to_, frames_[first_].data.data(), frames_[first_].bytes);
      first_ = (first_ + 1) % kFrames;
    }
  }
  TimePoint next() const { return count_ > 0 ? frames_[first_].due : TimePoint::max(); }
  pollfd wants() const { return {from_, static_cast<int16_t>(count_ < kFrames ? POLLIN : 0), 0}; }

 private:
  static constexpr size_t kFrames = 1000;  // as netem
  struct Frame {
    TimePoint due;
    size_t bytes = 0;
    std::array<char, 2048> data;
  };

  const int from_;
  const int to_;
  const CableShape shape_;
  std::vector<Frame> frames_;  // a ring
  size_t first_ = 0;
  size_t count_ = 0;
  TimePoint free_at_;  // when the last frame has left the sender
  std::mt19937_64 random_;
};

class Cable {
 public:
  // Null when this machine does not let us. Losses follow `seed` where we carry the frames.
  static std::unique_ptr<Cable> Lay(const IsolatedHost& left, const IsolatedHost& right,
                                    const CableShape& shape, uint64_t seed = 1) {
    std::unique_ptr<Cable> cable(new Cable(left, right));
    if (HasNetem(left)) {
      const bool laid =
          left.Join(right) && Netem(left, kLeft, shape) && Netem(right, kRight, shape);
      return laid ? std::move(cable) : nullptr;
    }
    const bool laid = cable->StartCarrier(shape, seed) && left.Configure(kLeft, kLeftAddress) &&
                      right.Configure(kRight, kRightAddress) && left.HasSignal(kLeft) &&
                      right.HasSignal(kRight);
    return laid ? std::move(cable) : nullptr;
  }
  ~Cable() {
    if (carrier_ < 0) return;
    kill(carrier_, SIGKILL);
    waitpid(carrier_, nullptr, 0);
  }
  Cable(const Cable&) = delete;
  Cable& operator=(const Cable&) = delete;

  // Nothing passes any more, and the right host is not told: what it sends goes nowhere.
  bool Cut() const { return left_.Run("ip link set " + std::string(kLeft) + " down"); }
  bool Mend() const { return left_.Run("ip link set " + std::string(kLeft) + " up"); }

  const char* kind() const { return carrier_ < 0 ? "netem" : "carried by a process"; }

 private:
  static constexpr const char* kLeft = IsolatedHost::kLeftInterface;
  static constexpr const char* kRight = IsolatedHost::kRightInterface;
  static constexpr const char* kLeftAddress = IsolatedHost::kLeftAddress;
  static constexpr const char* kRightAddress = IsolatedHost::kRightAddress;

  Cable(const IsolatedHost& left, const IsolatedHost& right) : left_(left), right_(right) {}

  static bool HasNetem(const IsolatedHost& host) {
    return host.Run("tc qdisc add dev lo root netem delay 0ms") &&
           host.Run("tc qdisc del dev lo root");
  }
  static bool Netem(const IsolatedHost& host, const std::string& interface,
                    const CableShape& shape) {
    return host.Run("tc qdisc add dev " + interface + " root netem limit 1000 delay " +
                    std::to_string(shape.delay.count()) + "ns rate " +
                    std::to_string(shape.mbit_per_second) + "mbit loss random " +
                    std::to_string(shape.loss * 100) + "%");
  }

  bool StartCarrier(const CableShape& shape, uint64_t seed) {
    const UniqueFd left = Tap(left_, kLeft);
    const UniqueFd right = Tap(right_, kRight);
    if (!left.valid() || !right.valid()) return false;
    // Made here: between fork and its end the child makes nothing but system calls.
    CableLane there(left.get(), right.get(), shape, seed);
    CableLane back(right.get(), left.get(), shape, seed + 1);
    carrier_ = fork();
    if (carrier_ == 0) Carry(there, back);  // keeps our ends open
    return carrier_ > 0;
  }

  // A tap interface on that host, with our end of it.
  static UniqueFd Tap(const IsolatedHost& host, const std::string& name) {
    UniqueFd tap;
    const UniqueFd home(open("/proc/thread-self/ns/net", O_RDONLY | O_CLOEXEC));
    if (!home.valid() || !host.EnterNetwork()) return tap;
    tap = UniqueFd(open("/dev/net/tun", O_RDWR | O_CLOEXEC | O_NONBLOCK));
    ifreq request{};
    request.ifr_flags = IFF_TAP | IFF_NO_PI;
    name.copy(request.ifr_name, IFNAMSIZ - 1);
    if (tap.valid() && ioctl(tap.get(), TUNSETIFF, &request) != 0) tap.Reset();
    if (setns(home.get(), CLONE_NEWNET) != 0) abort();
    return tap;
  }

  [[noreturn]] static void Carry(CableLane& there, CableLane& back) {
    prctl(PR_SET_PDEATHSIG, SIGKILL);
    prctl(PR_SET_TIMERSLACK, 1);
    while (true) {
      const TimePoint now = std::chrono::steady_clock::now();
      for (CableLane* lane : {&there, &back}) {
        lane->Receive(now);
        lane->Deliver(now);
      }
      const Duration left =
          std::clamp(std::min(there.next(), back.next()) - std::chrono::steady_clock::now(),
                     Duration::zero(), Duration(std::chrono::milliseconds(999)));
      const timespec wait{0, left.count()};
      std::array<pollfd, 2> fds = {there.wants(), back.wants()};
      ppoll(fds.data(), fds.size(), &wait, nullptr);
    }
  }

  const IsolatedHost& left_;
  const IsolatedHost& right_;
  pid_t carrier_ = -1;
};

}  // namespace kvrelay
