#include "tools/kvrelay/bench/bare_ucx.h"

#include <chrono>
#include <cstring>
#include <stop_token>

namespace kvrelay::tools {
namespace {

Status Check(ucs_status_t status, const char* what) {
  if (status == UCS_OK) return {};
  return {Code::kInternal, std::string(what) + ": " + ucs_status_string(status)};
}

// Strings one behind the other, each with its length in front.
void Append(std::string& out, const void* data, size_t bytes) {
  out.append(reinterpret_cast<const char*>(&bytes), sizeof(bytes));
  out.append(static_cast<const char*>(data), bytes);
}

Result<std::string> Take(std::string_view& in) {
  size_t bytes = 0;
  if (in.size() < sizeof(bytes)) return Error(Code::kInternal, "the owner's UCX says nothing");
  std::memcpy(&bytes, in.data(), sizeof(bytes));
  in.remove_prefix(sizeof(bytes));
  if (bytes > in.size()) return Error(Code::kInternal, "the owner's UCX is cut off");
  std::string out(in.substr(0, bytes));
  in.remove_prefix(bytes);
  return out;
}

}  // namespace

Result<std::unique_ptr<BareUcx>> BareUcx::Create(std::span<std::byte> memory) {
  std::unique_ptr<BareUcx> ucx(new BareUcx(memory));
  ucp_params_t params{};
  params.field_mask = UCP_PARAM_FIELD_FEATURES;
  params.features = UCP_FEATURE_RMA;
  KVRELAY_RETURN_IF_ERROR(Check(ucp_init(&params, nullptr, &ucx->context_), "ucp_init"));
  ucp_worker_params_t worker{};
  worker.field_mask = UCP_WORKER_PARAM_FIELD_THREAD_MODE;
  worker.thread_mode = UCS_THREAD_MODE_SERIALIZED;
  KVRELAY_RETURN_IF_ERROR(
      Check(ucp_worker_create(ucx->context_, &worker, &ucx->worker_), "ucp_worker_create"));
  ucp_mem_map_params_t map{};
  map.field_mask = UCP_MEM_MAP_PARAM_FIELD_ADDRESS | UCP_MEM_MAP_PARAM_FIELD_LENGTH;
  map.address = memory.data();
  map.length = memory.size();
  KVRELAY_RETURN_IF_ERROR(Check(ucp_mem_map(ucx->context_, &map, &ucx->handle_), "ucp_mem_map"));
  return ucx;
}

BareUcx::~BareUcx() {
  if (remote_key_ != nullptr) ucp_rkey_destroy(remote_key_);
  if (endpoint_ != nullptr) {
    ucp_request_param_t force{};
    force.op_attr_mask = UCP_OP_ATTR_FIELD_FLAGS;
    force.flags = UCP_EP_CLOSE_FLAG_FORCE;
    void* const closing = ucp_ep_close_nbx(endpoint_, &force);
    if (UCS_PTR_IS_PTR(closing)) {
      while (ucp_request_check_status(closing) == UCS_INPROGRESS) Progress();
      ucp_request_free(closing);
    }
  }
  if (handle_ != nullptr) ucp_mem_unmap(context_, handle_);
  if (worker_ != nullptr) ucp_worker_destroy(worker_);
  if (context_ != nullptr) ucp_cleanup(context_);
}

Result<std::string> BareUcx::Invitation() const {
  std::string text;
  ucp_address_t* address = nullptr;
  size_t bytes = 0;
  KVRELAY_RETURN_IF_ERROR(
      Check(ucp_worker_get_address(worker_, &address, &bytes), "ucp_worker_get_address"));
  Append(text, address, bytes);
  ucp_worker_release_address(worker_, address);
  void* key = nullptr;
  KVRELAY_RETURN_IF_ERROR(Check(ucp_rkey_pack(context_, handle_, &key, &bytes), "ucp_rkey_pack"));
  Append(text, key, bytes);
  ucp_rkey_buffer_release(key);
  const auto base = reinterpret_cast<uint64_t>(memory_.data());
  Append(text, &base, sizeof(base));
  return text;
}

Status BareUcx::Connect(const std::string& invitation) {
  std::string_view rest = invitation;
  KVRELAY_ASSIGN_OR_RETURN(const std::string address, Take(rest));
  KVRELAY_ASSIGN_OR_RETURN(const std::string key, Take(rest));
  KVRELAY_ASSIGN_OR_RETURN(const std::string base, Take(rest));
  std::memcpy(&remote_, base.data(), sizeof(remote_));
  ucp_ep_params_t params{};
  params.field_mask = UCP_EP_PARAM_FIELD_REMOTE_ADDRESS;
  params.address = reinterpret_cast<const ucp_address_t*>(address.data());
  KVRELAY_RETURN_IF_ERROR(Check(ucp_ep_create(worker_, &params, &endpoint_), "ucp_ep_create"));
  return Check(ucp_ep_rkey_unpack(endpoint_, key.data(), &remote_key_), "ucp_ep_rkey_unpack");
}

Status BareUcx::Get(const PullCase& pull) {
  ucp_request_param_t params{};
  params.op_attr_mask = UCP_OP_ATTR_FIELD_MEMH;
  params.memh = handle_;
  for (const CopySegment& slice : pull.slices) {
    void* const get = ucp_get_nbx(endpoint_, memory_.data() + slice.dst, pull.slice_bytes,
                                  remote_ + slice.src, remote_key_, &params);
    if (UCS_PTR_IS_ERR(get)) return Check(UCS_PTR_STATUS(get), "ucp_get_nbx");
    if (get != nullptr) ucp_request_free(get);  // the flush waits for it all the same
  }
  ucp_request_param_t none{};
  void* const flush = ucp_ep_flush_nbx(endpoint_, &none);
  if (UCS_PTR_IS_ERR(flush)) return Check(UCS_PTR_STATUS(flush), "ucp_ep_flush_nbx");
  if (flush == nullptr) return {};
  const auto until = std::chrono::steady_clock::now() + std::chrono::minutes(1);
  ucs_status_t status = UCS_INPROGRESS;
  while (status == UCS_INPROGRESS && std::chrono::steady_clock::now() < until) {
    Progress();
    status = ucp_request_check_status(flush);
  }
  ucp_request_free(flush);
  return Check(status, "ucp_ep_flush_nbx");
}

Result<std::unique_ptr<BareUcxOwner>> BareUcxOwner::Start(std::span<std::byte> memory) {
  std::unique_ptr<BareUcxOwner> owner(new BareUcxOwner);
  KVRELAY_ASSIGN_OR_RETURN(owner->ucx_, BareUcx::Create(memory));
  KVRELAY_ASSIGN_OR_RETURN(owner->invitation_, owner->ucx_->Invitation());
  owner->thread_ = std::jthread([ucx = owner->ucx_.get()](const std::stop_token& stop) {
    while (!stop.stop_requested()) {
      ucx->Progress();
      std::this_thread::sleep_for(std::chrono::microseconds(200));
    }
  });
  return owner;
}

}  // namespace kvrelay::tools
