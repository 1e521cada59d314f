#include "tools/kvrelay/bench/bare_worker.h"

#include <chrono>

namespace kvrelay::tools {

Status CheckUcx(ucs_status_t status, const char* what) {
  if (status == UCS_OK) return {};
  return {Code::kInternal, std::string(what) + ": " + ucs_status_string(status)};
}

Result<std::unique_ptr<BareWorker>> BareWorker::Create(uint64_t features,
                                                       const Settings& settings) {
  std::unique_ptr<BareWorker> bare(new BareWorker);
  ucp_config_t* read = nullptr;
  KVRELAY_RETURN_IF_ERROR(CheckUcx(ucp_config_read(nullptr, nullptr, &read), "ucp_config_read"));
  const std::unique_ptr<ucp_config_t, decltype(&ucp_config_release)> config(read,
                                                                            ucp_config_release);
  for (const auto& [name, value] : settings) {
    KVRELAY_RETURN_IF_ERROR(CheckUcx(ucp_config_modify(config.get(), name, value.c_str()), name));
  }
  ucp_params_t params{};
  params.field_mask = UCP_PARAM_FIELD_FEATURES;
  params.features = features;
  KVRELAY_RETURN_IF_ERROR(CheckUcx(ucp_init(&params, config.get(), &bare->context_), "ucp_init"));
  ucp_worker_params_t worker{};
  worker.field_mask = UCP_WORKER_PARAM_FIELD_THREAD_MODE;
  worker.thread_mode = UCS_THREAD_MODE_SERIALIZED;
  KVRELAY_RETURN_IF_ERROR(
      CheckUcx(ucp_worker_create(bare->context_, &worker, &bare->worker_), "ucp_worker_create"));
  return bare;
}

BareWorker::~BareWorker() {
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
  if (worker_ != nullptr) ucp_worker_destroy(worker_);
  if (context_ != nullptr) ucp_cleanup(context_);
}

Result<std::string> BareWorker::Address() const {
  ucp_address_t* address = nullptr;
  size_t bytes = 0;
  KVRELAY_RETURN_IF_ERROR(
      CheckUcx(ucp_worker_get_address(worker_, &address, &bytes), "ucp_worker_get_address"));
  std::string copy(reinterpret_cast<const char*>(address), bytes);
  ucp_worker_release_address(worker_, address);
  return copy;
}

Status BareWorker::Connect(const std::string& address, ucp_err_handling_mode_t errors) {
  ucp_ep_params_t params{};
  params.field_mask = UCP_EP_PARAM_FIELD_REMOTE_ADDRESS | UCP_EP_PARAM_FIELD_ERR_HANDLING_MODE |
                      UCP_EP_PARAM_FIELD_ERR_HANDLER;
  params.address = reinterpret_cast<const ucp_address_t*>(address.data());
  params.err_mode = errors;
  params.err_handler.cb = [](void*, ucp_ep_h, ucs_status_t) {};  // operations say it, too
  return CheckUcx(ucp_ep_create(worker_, &params, &endpoint_), "ucp_ep_create");
}

Status BareWorker::Flush() {
  const ucp_request_param_t none{};
  void* const flush = ucp_ep_flush_nbx(endpoint_, &none);
  if (UCS_PTR_IS_ERR(flush)) return CheckUcx(UCS_PTR_STATUS(flush), "ucp_ep_flush_nbx");
  if (flush == nullptr) return {};
  const auto until = std::chrono::steady_clock::now() + std::chrono::minutes(1);
  ucs_status_t status = UCS_INPROGRESS;
  while (status == UCS_INPROGRESS && std::chrono::steady_clock::now() < until) {
    Progress();
    status = ucp_request_check_status(flush);
  }
  ucp_request_free(flush);
  return CheckUcx(status, "ucp_ep_flush_nbx");
}

}  // namespace kvrelay::tools
