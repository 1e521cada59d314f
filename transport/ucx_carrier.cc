#include "transport/ucx_carrier.h"

#include <utility>

#include "transport/ucx_endpoint.h"
#include "transport/ucx_version.h"
#include "transport/ucx_worker.h"

namespace kvrelay::transport {
namespace {

class UcxCarrier final : public PackedCarrier {
 public:
  UcxCarrier(UcxSettings settings, std::shared_ptr<UcxWorker> worker)
      : settings_(std::move(settings)), worker_(std::move(worker)) {}
  ~UcxCarrier() override {
    if (loop_ != nullptr) loop_->Unwatch(event_fd_);
  }

  std::string_view name() const override { return "ucx-packed"; }
  std::string library() const override { return UcxLibrary(); }
  std::string where() const override { return "interface: " + settings_.interface; }
  uint64_t max_bytes_per_peer() const override { return 2 * settings_.segment_bytes(); }

  Result<std::string> Start(EventLoop& loop, OnMessage on_message, OnForeign on_foreign) override {
    KVRELAY_RETURN_IF_ERROR(worker_->Receive(std::move(on_message), std::move(on_foreign)));
    KVRELAY_ASSIGN_OR_RETURN(event_fd_, worker_->EventFd());
    KVRELAY_RETURN_IF_ERROR(loop.Watch(event_fd_, EPOLLIN, [](uint32_t) {}));
    loop_ = &loop;
    return worker_->Address();
  }

  Result<std::unique_ptr<PackedEndpoint>> Connect(const PackedAddress& peer) override {
    KVRELAY_RETURN_IF_ERROR(CheckSameRelease(peer.library));
    KVRELAY_ASSIGN_OR_RETURN(std::unique_ptr<UcxEndpoint> endpoint,
                             UcxEndpoint::Create(*worker_, peer.worker));
    return endpoint;
  }

  bool Progress() override { return worker_->Progress(); }
  bool PrepareToSleep() override { return worker_->Arm(); }

 private:
  const UcxSettings settings_;
  const std::shared_ptr<UcxWorker> worker_;
  EventLoop* loop_ = nullptr;
  int event_fd_ = -1;
};

}  // namespace

Result<std::unique_ptr<PackedCarrier>> CreateUcxCarrier(const std::string& interface,
                                                        uint64_t message_bytes) {
  UcxSettings settings{.interface = interface.empty() ? "lo" : interface,
                       .message_bytes = message_bytes};
  KVRELAY_ASSIGN_OR_RETURN(std::shared_ptr<UcxContext> context, UcxContext::CreatePacked(settings));
  KVRELAY_ASSIGN_OR_RETURN(std::shared_ptr<UcxWorker> worker,
                           UcxWorker::Create(std::move(context)));
  return std::make_unique<UcxCarrier>(std::move(settings), std::move(worker));
}

}  // namespace kvrelay::transport
