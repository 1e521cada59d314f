#include "tools/kvrelay/bench/bare_stream.h"

#include <algorithm>
#include <chrono>

namespace kvrelay::tools {
namespace {

constexpr unsigned kMessageId = 1;
constexpr uint32_t kWindow = 32;
constexpr auto kPatience = std::chrono::minutes(1);

Result<std::unique_ptr<BareWorker>> StreamWorker(uint64_t message_bytes) {
  const std::string segment = std::to_string(message_bytes + 4096);
  return BareWorker::Create(UCP_FEATURE_AM, {{"TLS", "tcp"},
                                             {"NET_DEVICES", "lo"},
                                             {"TCP_TX_SEG_SIZE", segment},
                                             {"TCP_RX_SEG_SIZE", segment},
                                             {"RNDV_THRESH", "inf"},
                                             {"PROTO_ENABLE", "n"}});
}

}  // namespace

Result<std::unique_ptr<BareSender>> BareSender::Connect(const std::string& receiver,
                                                        uint64_t message_bytes) {
  KVRELAY_ASSIGN_OR_RETURN(auto worker, StreamWorker(message_bytes));
  KVRELAY_RETURN_IF_ERROR(worker->Connect(receiver, UCP_ERR_HANDLING_MODE_PEER));
  return std::unique_ptr<BareSender>(new BareSender(std::move(worker), message_bytes));
}

Status BareSender::Send(uint64_t bytes) {
  ucp_request_param_t params{};
  params.op_attr_mask =
      UCP_OP_ATTR_FIELD_CALLBACK | UCP_OP_ATTR_FIELD_USER_DATA | UCP_OP_ATTR_FIELD_FLAGS;
  params.flags = UCP_AM_SEND_FLAG_EAGER;
  params.user_data = this;
  params.cb.send = [](void* request, ucs_status_t status, void* user) {
    auto& self = *static_cast<BareSender*>(user);
    --self.in_flight_;
    if (status != UCS_OK) self.failure_ = CheckUcx(status, "a message");
    ucp_request_free(request);
  };
  while (bytes > 0) {
    const uint64_t part = std::min<uint64_t>(bytes, message_.size());
    KVRELAY_RETURN_IF_ERROR(Wait(kWindow - 1));
    void* const sent = ucp_am_send_nbx(worker_->endpoint(), kMessageId, nullptr, 0, message_.data(),
                                       part, &params);
    if (UCS_PTR_IS_ERR(sent)) return CheckUcx(UCS_PTR_STATUS(sent), "ucp_am_send_nbx");
    if (sent != nullptr) ++in_flight_;
    bytes -= part;
  }
  return Wait(0);
}

Status BareSender::Wait(uint32_t in_flight) {
  const auto until = std::chrono::steady_clock::now() + kPatience;
  while (in_flight_ > in_flight && failure_.ok()) {
    worker_->Progress();
    if (std::chrono::steady_clock::now() > until) {
      return {Code::kDeadlineExceeded, "messages are not sent within a minute"};
    }
  }
  return failure_;
}

Result<std::unique_ptr<BareReceiver>> BareReceiver::Create(uint64_t message_bytes) {
  KVRELAY_ASSIGN_OR_RETURN(auto worker, StreamWorker(message_bytes));
  std::unique_ptr<BareReceiver> receiver(new BareReceiver(std::move(worker)));
  ucp_am_handler_param_t handler{};
  handler.field_mask = UCP_AM_HANDLER_PARAM_FIELD_ID | UCP_AM_HANDLER_PARAM_FIELD_FLAGS |
                       UCP_AM_HANDLER_PARAM_FIELD_CB | UCP_AM_HANDLER_PARAM_FIELD_ARG;
  handler.id = kMessageId;
  handler.flags = UCP_AM_FLAG_WHOLE_MSG;
  handler.cb = [](void* self, const void*, size_t, void*, size_t bytes,
                  const ucp_am_recv_param_t*) {
    static_cast<BareReceiver*>(self)->received_ += bytes;
    return UCS_OK;
  };
  handler.arg = receiver.get();
  KVRELAY_RETURN_IF_ERROR(
      CheckUcx(ucp_worker_set_am_recv_handler(receiver->worker_->get(), &handler),
               "ucp_worker_set_am_recv_handler"));
  return receiver;
}

Status BareReceiver::Receive(uint64_t bytes) {
  asked_ += bytes;
  const auto until = std::chrono::steady_clock::now() + kPatience;
  while (received_ < asked_) {
    worker_->Progress();
    if (std::chrono::steady_clock::now() > until) {
      return {Code::kDeadlineExceeded, "messages did not come within a minute"};
    }
  }
  return {};
}

}  // namespace kvrelay::tools
