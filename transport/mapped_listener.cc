#include "transport/mapped_listener.h"

#include <glog/logging.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <filesystem>

#include "base/random.h"
#include "transport/mapped_wire.h"
#include "transport/unix_socket.h"

namespace kvrelay::transport {
namespace {

constexpr std::string_view kPrefix = "mapped-";
constexpr std::string_view kSuffix = ".sock";
constexpr Duration kAcceptPause = std::chrono::milliseconds(100);

Status PrepareFolder(const std::string& run_dir) {
  if (mkdir(run_dir.c_str(), 0700) != 0 && errno != EEXIST) {
    return Error(Code::kInvalidArgument,
                 "cannot create the socket folder " + run_dir + ": " + std::strerror(errno));
  }
  struct stat info {};
  if (lstat(run_dir.c_str(), &info) != 0 || !S_ISDIR(info.st_mode)) {
    return Error(Code::kInvalidArgument, "the socket folder " + run_dir + " is not a folder");
  }
  if (info.st_uid != geteuid() || (info.st_mode & 0077) != 0) {
    return Error(Code::kRefused, "the socket folder " + run_dir + " must belong to uid " +
                                     std::to_string(geteuid()) + " with mode 0700");
  }
  return {};
}

// Sockets of processes that were killed. A live one listens before its name appears, so refusal
// means that it is dead.
void RemoveDeadSockets(const std::string& run_dir) {
  std::error_code error;
  for (const auto& entry : std::filesystem::directory_iterator(run_dir, error)) {
    const std::string name = entry.path().filename().string();
    if (!name.starts_with(kPrefix) || !name.ends_with(kSuffix)) continue;
    const auto connected = ConnectUnix(entry.path().string());
    if (!connected.has_value() && connected.error().code() == Code::kPeerUnreachable) {
      unlink(entry.path().c_str());
    }
  }
}

}  // namespace

Result<std::unique_ptr<MappedListener>> MappedListener::Create(EventLoop& loop,
                                                               const std::string& run_dir,
                                                               std::vector<LocalRegion> regions,
                                                               Incarnation incarnation) {
  KVRELAY_RETURN_IF_ERROR(PrepareFolder(run_dir));
  RemoveDeadSockets(run_dir);
  std::unique_ptr<MappedListener> listener(
      new MappedListener(loop, std::move(regions), incarnation));
  listener->nonce_ = Random64();
  const std::string path = std::filesystem::absolute(run_dir).lexically_normal() /
                           (std::string(kPrefix) + std::to_string(getpid()) + '-' +
                            std::to_string(listener->nonce_) + std::string(kSuffix));
  KVRELAY_ASSIGN_OR_RETURN(listener->listen_fd_, ListenUnix(path));
  listener->socket_path_ = path;
  return listener;
}

MappedListener::~MappedListener() {
  while (!readers_.empty()) Close(readers_.begin()->first);
  if (accepting_) loop_.Unwatch(listen_fd_.get());
  if (!socket_path_.empty()) unlink(socket_path_.c_str());
}

Status MappedListener::Start() {
  accept_again_ = TimePoint::max();
  KVRELAY_RETURN_IF_ERROR(loop_.Watch(listen_fd_.get(), EPOLLIN, [this](uint32_t) { Accept(); }));
  accepting_ = true;
  return {};
}

TimePoint MappedListener::Expire(TimePoint now) {
  TimePoint next = TimePoint::max();
  std::vector<int> late;
  for (const auto& [fd, reader] : readers_) {
    if (reader.deadline <= now) {
      late.push_back(fd);
    } else {
      next = std::min(next, reader.deadline);
    }
  }
  for (const int fd : late) Close(fd);
  if (!accepting_ && accept_again_ <= now && !Start().ok()) accept_again_ = now + kAcceptPause;
  return std::min(next, accept_again_);
}

void MappedListener::Accept() {
  while (true) {
    Result<UniqueFd> accepted = AcceptUnix(listen_fd_.get());
    if (!accepted.has_value()) {
      // The waiting connection keeps the listener readable: look away, or this thread would spin.
      LOG(WARNING) << "mapped: " << accepted.error().message();
      loop_.Unwatch(listen_fd_.get());
      accepting_ = false;
      accept_again_ = EventLoop::Now() + kAcceptPause;
      return;
    }
    if (!accepted->valid()) return;
    const Result<uid_t> uid = PeerUid(accepted->get());
    if (!uid.has_value() || *uid != geteuid() || readers_.size() >= kMaxReaders) continue;
    const int fd = accepted->get();
    if (!loop_.Watch(fd, EPOLLIN, [this, fd](uint32_t events) { OnReady(fd, events); }).ok()) {
      continue;
    }
    Reader& reader = readers_[fd];
    reader.fd = std::move(*accepted);
    reader.deadline = EventLoop::Now() + kHelloTimeout;
  }
}

void MappedListener::OnReady(int fd, uint32_t events) {
  Reader& reader = readers_.at(fd);
  const bool readable = (events & (EPOLLIN | EPOLLHUP | EPOLLERR)) != 0;
  if ((readable && !ReceiveHello(reader)) || (reader.greeted && !SendRegions(reader))) Close(fd);
}

bool MappedListener::ReceiveHello(Reader& reader) {
  mapped::Hello hello;
  size_t size = 0;
  std::vector<UniqueFd> fds;
  const SocketState state =
      ReceiveMessage(reader.fd.get(), std::as_writable_bytes(std::span(&hello, 1)), size, fds);
  if (state == SocketState::kWouldBlock) return true;
  if (state == SocketState::kClosed || reader.greeted) return false;  // ended, or says too much
  if (size != sizeof(hello) || !fds.empty() || hello.magic != mapped::kMagic ||
      hello.nonce != nonce_) {
    return false;
  }
  if (hello.incarnation != incarnation_) {
    const mapped::RegionBatch refusal{.answer = mapped::Answer::kOtherIncarnation};
    SendMessage(reader.fd.get(), std::as_bytes(std::span(&refusal, 1)), {});
    return false;
  }
  reader.greeted = true;
  return true;
}

bool MappedListener::SendRegions(Reader& reader) {
  const uint32_t total = static_cast<uint32_t>(regions_.size());
  while (reader.next_region < total) {
    mapped::RegionBatch batch;
    batch.total_regions = total;
    batch.first_region = reader.next_region;
    batch.count = std::min<uint32_t>(total - batch.first_region, kMaxFdsPerMessage);
    int fds[kMaxFdsPerMessage];
    for (uint32_t i = 0; i < batch.count; ++i) {
      const LocalRegion& region = regions_[batch.first_region + i];
      batch.bytes[i] = region.bytes;
      batch.device[i] = region.device;
      fds[i] = region.export_fd;
    }
    switch (SendMessage(reader.fd.get(), std::as_bytes(std::span(&batch, 1)),
                        std::span(fds, batch.count))) {
      case SocketState::kWouldBlock:
        return loop_.Change(reader.fd.get(), EPOLLIN | EPOLLOUT).ok();
      case SocketState::kClosed:
        return false;
      case SocketState::kDone:
        reader.next_region += batch.count;
    }
  }
  if (reader.deadline == TimePoint::max()) return true;
  reader.deadline = TimePoint::max();
  return loop_.Change(reader.fd.get(), EPOLLIN).ok();
}

void MappedListener::Close(int fd) {
  loop_.Unwatch(fd);
  readers_.erase(fd);
}

}  // namespace kvrelay::transport
