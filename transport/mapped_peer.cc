#include "transport/mapped_peer.h"

#include <chrono>
#include <string>
#include <utility>

#include "transport/mapped_wire.h"
#include "transport/unix_socket.h"

namespace kvrelay::transport {
namespace {

constexpr Duration kBacklogPause = std::chrono::milliseconds(5);
constexpr uint64_t kPopulateBytes = 1 << 20;

}  // namespace

MappedPeer::MappedPeer(EventLoop& loop, PeerSpec spec, HostIdentity self, Mapper& mapper,
                       OnState on_state)
    : loop_(loop),
      spec_(std::move(spec)),
      self_(std::move(self)),
      mapper_(mapper),
      on_state_(std::move(on_state)) {}

MappedPeer::~MappedPeer() {
  if (fd_) loop_.Unwatch(fd_.get());
  mapper_.Drop(std::move(memory_));
}

void MappedPeer::Retry() {
  retry_at_ = TimePoint::max();
  Status status = Connect();
  if (status.code() == Code::kOverloaded) {
    retry_at_ = std::chrono::steady_clock::now() + kBacklogPause;
  } else if (!status.ok()) {
    Fail(std::move(status));
  }
}

Status MappedPeer::Connect() {
  KVRELAY_ASSIGN_OR_RETURN(const MappedAddress address, MappedAddress::Decode(spec_.address));
  KVRELAY_RETURN_IF_ERROR(CheckSameHost(address.host, self_));
  KVRELAY_ASSIGN_OR_RETURN(UniqueFd fd, ConnectUnix(address.socket_path));
  KVRELAY_ASSIGN_OR_RETURN(const uid_t uid, PeerUid(fd.get()));
  if (uid != self_.uid) {
    return Error(Code::kRefused, "the socket " + address.socket_path + " belongs to uid " +
                                     std::to_string(uid) + ", we are " + std::to_string(self_.uid));
  }
  const mapped::Hello hello{.nonce = address.nonce, .incarnation = spec_.incarnation};
  if (SendMessage(fd.get(), std::as_bytes(std::span(&hello, 1)), {}) != SocketState::kDone) {
    return Error(Code::kPeerUnreachable, "the owner closed the socket " + address.socket_path);
  }
  KVRELAY_RETURN_IF_ERROR(loop_.Watch(fd.get(), EPOLLIN, [this](uint32_t) { OnReady(); }));
  fd_ = std::move(fd);
  return {};
}

bool MappedPeer::PopulateNext() {
  if (!ready_ || populated_ == memory_->host.size()) return false;
  if (!memory_->host[populated_].PopulateNext(kPopulateBytes)) ++populated_;
  return populated_ < memory_->host.size();
}

void MappedPeer::OnReady() {
  const bool was_mapping = mapping_;
  Status status = ReceiveRegions();
  if (!status.ok()) return Fail(std::move(status));
  if (!mapping_ || was_mapping) return;
  mapper_.Map(std::move(announced_), [this, alive = std::weak_ptr(alive_), mapper = &mapper_](
                                         Result<std::shared_ptr<MappedMemory>> memory) {
    if (!alive.expired() && fd_) return OnMapped(std::move(memory));
    if (memory.has_value()) mapper->Drop(*std::move(memory));
  });
}

Status MappedPeer::ReceiveRegions() {
  while (true) {
    mapped::RegionBatch batch;
    size_t size = 0;
    std::vector<UniqueFd> fds;
    switch (ReceiveMessage(fd_.get(), std::as_writable_bytes(std::span(&batch, 1)), size, fds)) {
      case SocketState::kWouldBlock:
        return {};
      case SocketState::kClosed:
        return Error(Code::kPeerUnreachable,
                     mapping_ ? "the owner's process has ended"
                              : "the owner closed the socket before it gave its regions");
      case SocketState::kDone:
        break;
    }
    if (size != sizeof(batch) || batch.magic != mapped::kMagic || mapping_) {
      return Error(Code::kIncompatible, "the owner's socket speaks another version");
    }
    if (batch.answer == mapped::Answer::kOtherIncarnation) {
      return Error(Code::kPeerUnreachable, "the owner was restarted: another incarnation answers");
    }
    if (batch.total_regions != spec_.region_bytes.size() ||
        batch.first_region != announced_.size() || batch.count == 0 ||
        batch.count > batch.total_regions - batch.first_region || batch.count != fds.size()) {
      return Error(Code::kIncompatible, "the owner's socket offers " +
                                            std::to_string(batch.total_regions) +
                                            " regions, its description names " +
                                            std::to_string(spec_.region_bytes.size()));
    }
    for (uint32_t i = 0; i < batch.count; ++i) {
      const size_t id = announced_.size();
      if (batch.bytes[i] != spec_.region_bytes[id]) {
        return Error(Code::kIncompatible,
                     "region " + std::to_string(id) + " has " + std::to_string(batch.bytes[i]) +
                         " bytes on the owner's socket, " + std::to_string(spec_.region_bytes[id]) +
                         " in its description");
      }
      announced_.push_back({std::move(fds[i]), batch.bytes[i], batch.device[i]});
    }
    mapping_ = announced_.size() == spec_.region_bytes.size();
  }
}

void MappedPeer::OnMapped(Result<std::shared_ptr<MappedMemory>> memory) {
  if (!memory.has_value()) return Fail(std::move(memory).error());
  memory_ = *std::move(memory);
  ready_ = true;
  on_state_(Status::Ok());
}

void MappedPeer::Fail(Status status) {
  if (fd_) loop_.Unwatch(fd_.get());
  fd_.Reset();
  ready_ = false;
  mapper_.Drop(std::exchange(memory_, nullptr));
  on_state_(std::move(status));
}

}  // namespace kvrelay::transport
