#include "transport/ucx_endpoint.h"

#include <cstring>
#include <string>
#include <utility>
#include <vector>

namespace kvrelay::transport {
namespace {

Status SendStatus(ucs_status_t status) {
  if (status == UCS_OK) return {};
  return Status(Code::kPeerUnreachable, std::string("UCX: ") + ucs_status_string(status));
}

struct PendingSend {
  uint32_t* in_flight;
  UcxEndpoint::Sent sent;
};

}  // namespace

Result<std::unique_ptr<UcxEndpoint>> UcxEndpoint::Create(UcxWorker& worker,
                                                         std::string_view address) {
  std::unique_ptr<UcxEndpoint> endpoint(new UcxEndpoint);
  // UCX parses the address without knowing its length: behind the end of a damaged one it finds
  // zeros of ours.
  constexpr size_t kPadding = 4096;
  std::vector<char> padded(address.size() + kPadding);
  std::memcpy(padded.data(), address.data(), address.size());
  ucp_ep_params_t params{};
  params.field_mask = UCP_EP_PARAM_FIELD_REMOTE_ADDRESS | UCP_EP_PARAM_FIELD_ERR_HANDLING_MODE |
                      UCP_EP_PARAM_FIELD_ERR_HANDLER;
  params.address = reinterpret_cast<const ucp_address_t*>(padded.data());
  params.err_mode = UCP_ERR_HANDLING_MODE_PEER;
  params.err_handler.cb = &UcxEndpoint::OnError;
  params.err_handler.arg = endpoint.get();
  if (const ucs_status_t status = ucp_ep_create(worker.get(), &params, &endpoint->endpoint_);
      status != UCS_OK) {
    return Error(Code::kPeerUnreachable,
                 std::string("UCX finds no way to the peer, is it on another network? ") +
                     ucs_status_string(status));
  }
  return endpoint;
}

void UcxEndpoint::Send(std::span<const std::byte> header, std::span<const std::byte> data,
                       Sent sent) {
  auto pending = std::make_unique<PendingSend>(PendingSend{&in_flight_, std::move(sent)});
  ucp_request_param_t param{};
  param.op_attr_mask =
      UCP_OP_ATTR_FIELD_CALLBACK | UCP_OP_ATTR_FIELD_USER_DATA | UCP_OP_ATTR_FIELD_FLAGS;
  param.flags = UCP_AM_SEND_FLAG_EAGER;
  param.cb.send = &UcxEndpoint::OnSent;
  param.user_data = pending.get();
  const ucs_status_ptr_t request = ucp_am_send_nbx(endpoint_, kUcxMessageId, header.data(),
                                                   header.size(), data.data(), data.size(), &param);
  if (UCS_PTR_IS_PTR(request)) {
    ++in_flight_;
    (void)pending.release();  // OnSent owns it
    return;
  }
  // Done inside the call: UCX does not call back.
  pending->sent(SendStatus(UCS_PTR_RAW_STATUS(request)));
}

void UcxEndpoint::Get(std::span<std::byte> into, const UcxMemory& memory, uint64_t remote,
                      const UcxRemoteKey& key, UcxGets* gets) {
  ucp_request_param_t param{};
  param.op_attr_mask = UCP_OP_ATTR_FIELD_CALLBACK | UCP_OP_ATTR_FIELD_USER_DATA;
  param.cb.send = &UcxEndpoint::OnGot;
  param.user_data = gets;
#if UCP_API_VERSION >= UCP_VERSION(1, 14)
  param.op_attr_mask |= UCP_OP_ATTR_FIELD_MEMH;
  param.memh = memory.get();
#else
  (void)memory;  // UCX looks the registration up by itself
#endif
  const ucs_status_ptr_t request =
      ucp_get_nbx(endpoint_, into.data(), into.size(), remote, key.get(), &param);
  if (UCS_PTR_IS_PTR(request)) {
    ++gets->in_flight;
    return;
  }
  // Done inside the call: UCX does not call back.
  if (const ucs_status_t status = UCS_PTR_RAW_STATUS(request); gets->failure == UCS_OK) {
    gets->failure = status;
  }
}

void UcxEndpoint::Close() {
  closing_ = true;
  ucp_request_param_t param{};
  param.op_attr_mask =
      UCP_OP_ATTR_FIELD_CALLBACK | UCP_OP_ATTR_FIELD_USER_DATA | UCP_OP_ATTR_FIELD_FLAGS;
  param.flags = UCP_EP_CLOSE_FLAG_FORCE;
  param.cb.send = &UcxEndpoint::OnClosed;
  param.user_data = this;
  const ucs_status_ptr_t request = ucp_ep_close_nbx(endpoint_, &param);
  if (!UCS_PTR_IS_PTR(request)) closed_ = true;
}

void UcxEndpoint::OnError(void* self, ucp_ep_h, ucs_status_t status) {
  static_cast<UcxEndpoint*>(self)->failure_ = SendStatus(status);
}

void UcxEndpoint::OnSent(void* request, ucs_status_t status, void* context) {
  ucp_request_free(request);
  const std::unique_ptr<PendingSend> pending(static_cast<PendingSend*>(context));
  --*pending->in_flight;
  pending->sent(SendStatus(status));
}

void UcxEndpoint::OnGot(void* request, ucs_status_t status, void* context) {
  ucp_request_free(request);
  auto* gets = static_cast<UcxGets*>(context);
  --gets->in_flight;
  if (gets->failure == UCS_OK) gets->failure = status;
}

void UcxEndpoint::OnClosed(void* request, ucs_status_t, void* self) {
  ucp_request_free(request);
  static_cast<UcxEndpoint*>(self)->closed_ = true;
}

}  // namespace kvrelay::transport
