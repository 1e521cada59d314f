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

MappedPeer::MappedPeer(EventLoop& loop, PeerSpec spec, HostIdentity self, Device* device,
                       OnState on_state)
    : loop_(loop),
      spec_(std::move(spec)),
      self_(std::move(self)),
      device_(device),
      on_state_(std::move(on_state)) {}

MappedPeer::~MappedPeer() {
  if (fd_) loop_.Unwatch(fd_.get());
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
  const bool was_ready = ready_;
  Status status = ReceiveRegions();
  if (!status.ok()) return Fail(std::move(status));
  if (ready_ && !was_ready) on_state_(Status::Ok());
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
                     ready_ ? "the owner's process has ended"
                            : "the owner closed the socket before it gave its regions");
      case SocketState::kDone:
        break;
    }
    if (size != sizeof(batch) || batch.magic != mapped::kMagic || ready_) {
      return Error(Code::kIncompatible, "the owner's socket speaks another version");
    }
    if (batch.answer == mapped::Answer::kOtherIncarnation) {
      return Error(Code::kPeerUnreachable, "the owner was restarted: another incarnation answers");
    }
    if (batch.total_regions != spec_.region_bytes.size() ||
        batch.first_region != memory_->bases.size() || batch.count == 0 ||
        batch.count > batch.total_regions - batch.first_region || batch.count != fds.size()) {
      return Error(Code::kIncompatible, "the owner's socket offers " +
                                            std::to_string(batch.total_regions) +
                                            " regions, its description names " +
                                            std::to_string(spec_.region_bytes.size()));
    }
    for (uint32_t i = 0; i < batch.count; ++i) {
      const size_t id = memory_->bases.size();
      if (batch.bytes[i] != spec_.region_bytes[id]) {
        return Error(Code::kIncompatible,
                     "region " + std::to_string(id) + " has " + std::to_string(batch.bytes[i]) +
                         " bytes on the owner's socket, " + std::to_string(spec_.region_bytes[id]) +
                         " in its description");
      }
      if (Status status = MapRegion(std::move(fds[i]), batch.bytes[i], batch.device[i]);
          !status.ok()) {
        return status.Wrap("region " + std::to_string(id));
      }
    }
    if (memory_->bases.size() < spec_.region_bytes.size()) continue;
    if (device_ != nullptr && memory_->device.empty()) KVRELAY_RETURN_IF_ERROR(PinRegions());
    ready_ = true;
  }
}

Status MappedPeer::MapRegion(UniqueFd fd, uint64_t bytes, DeviceKind kind) {
  switch (kind) {
    case DeviceKind::kCpu: {
      KVRELAY_ASSIGN_OR_RETURN(MappedRegion region, MappedRegion::Map(std::move(fd), bytes));
      memory_->bases.push_back(region.data());
      memory_->host.push_back(std::move(region));
      break;
    }
    case DeviceKind::kCuda: {
      if (device_ == nullptr) {
        return {Code::kIncompatible, "it is a GPU's memory, ours is the host's"};
      }
      KVRELAY_ASSIGN_OR_RETURN(std::unique_ptr<DeviceMapping> mapping,
                               device_->Map(std::move(fd), bytes));
      memory_->bases.push_back(mapping->data());
      memory_->device.push_back(std::move(mapping));
      break;
    }
    default:
      return {Code::kIncompatible, "memory of a kind that we do not know"};
  }
  memory_->bytes.push_back(bytes);
  return {};
}

Status MappedPeer::PinRegions() {
  for (size_t id = 0; id < memory_->host.size(); ++id) {
    const MappedRegion& region = memory_->host[id];
    const std::string which = "region " + std::to_string(id) + " is the host's memory";
    if (!region.keeps_pages()) {
      return Error(Code::kIncompatible, which + ", whose pages come and go");
    }
    auto pinned = device_->Pin({region.data(), region.bytes()}, HostAccess::kRead);
    if (!pinned.has_value()) return pinned.error().Wrap(which);
    memory_->pinned.push_back(*std::move(pinned));
  }
  return {};
}

void MappedPeer::Fail(Status status) {
  if (fd_) loop_.Unwatch(fd_.get());
  fd_.Reset();
  ready_ = false;
  memory_.reset();
  on_state_(std::move(status));
}

}  // namespace kvrelay::transport
