// The owner's side of `mapped`: hands read-only descriptors of this process's regions to processes
// of the same user.
#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "base/clock.h"
#include "base/status.h"
#include "base/unique_fd.h"
#include "transport/event_loop.h"
#include "transport/transport.h"

namespace kvrelay::transport {

// Created anywhere, then transfer thread only. Keeps each reader's socket open, so that a reader
// sees this process end; a reader that ends, misbehaves, or says nothing for kHelloTimeout is
// closed and forgotten.
class MappedListener {
 public:
  static constexpr Duration kHelloTimeout = std::chrono::seconds(2);
  static constexpr size_t kMaxReaders = 1024;

  // Makes `run_dir` if it is absent, refuses one that other users can enter, and removes sockets
  // that ended processes left in it. Every region has a descriptor. `loop` outlives the listener.
  static Result<std::unique_ptr<MappedListener>> Create(EventLoop& loop, const std::string& run_dir,
                                                        std::vector<LocalRegion> regions,
                                                        Incarnation incarnation);
  ~MappedListener();

  const std::string& socket_path() const { return socket_path_; }
  uint64_t nonce() const { return nonce_; }

  // Begins to accept.
  Status Start();
  // Closes readers whose time is up. Returns when to call again, TimePoint::max() when nothing
  // waits.
  TimePoint Expire(TimePoint now);

 private:
  struct Reader {
    UniqueFd fd;
    TimePoint deadline;        // of the whole hand-over; max() when it is done
    bool greeted = false;      // its Hello was good
    uint32_t next_region = 0;  // the first that was not sent yet
  };

  MappedListener(EventLoop& loop, std::vector<LocalRegion> regions, Incarnation incarnation)
      : loop_(loop), regions_(std::move(regions)), incarnation_(incarnation) {}

  void Accept();
  void OnReady(int fd, uint32_t events);
  // False: the reader is to be closed.
  bool ReceiveHello(Reader& reader);
  bool SendRegions(Reader& reader);
  void Close(int fd);

  EventLoop& loop_;
  const std::vector<LocalRegion> regions_;
  const Incarnation incarnation_;
  std::string socket_path_;
  uint64_t nonce_ = 0;
  UniqueFd listen_fd_;
  bool accepting_ = false;  // off for a while when this process is out of descriptors
  TimePoint accept_again_ = TimePoint::max();
  std::map<int, Reader> readers_;
};

}  // namespace kvrelay::transport
