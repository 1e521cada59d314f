// UCX with nothing of ours around it, at its best settings: what the transports are measured
// against. One-sided reads over cma, and a stream of eager active messages over TCP, both in error
// mode PEER.
#pragma once

#include <ucp/api/ucp.h>

#include <cstdint>
#include <cstdlib>
#include <functional>
#include <iostream>
#include <optional>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "transport/ucx_one_sided.h"

namespace kvrelay::bench {

inline void Expect(bool ok, const char* what) {
  if (ok) return;
  std::cerr << "bare UCX: " << what << "\n";
  _Exit(1);
}

// A context with one worker and at most one endpoint. One thread.
class BareUcx {
 public:
  using Settings = std::vector<std::pair<const char*, std::string>>;

  BareUcx(uint64_t features, const Settings& settings) {
    ucp_config_t* config = nullptr;
    Expect(ucp_config_read(nullptr, nullptr, &config) == UCS_OK, "ucp_config_read");
    for (const auto& [name, value] : settings) {
      (void)ucp_config_modify(config, name, value.c_str());
    }
    ucp_params_t params{};
    params.field_mask = UCP_PARAM_FIELD_FEATURES;
    params.features = features;
    Expect(ucp_init(&params, config, &context_) == UCS_OK, "ucp_init");
    ucp_config_release(config);
    ucp_worker_params_t worker{};
    worker.field_mask = UCP_WORKER_PARAM_FIELD_THREAD_MODE;
    worker.thread_mode = UCS_THREAD_MODE_SINGLE;
    Expect(ucp_worker_create(context_, &worker, &worker_) == UCS_OK, "ucp_worker_create");
  }
  ~BareUcx() {
    if (key_ != nullptr) ucp_rkey_destroy(key_);
    if (memory_ != nullptr) (void)ucp_mem_unmap(context_, memory_);
    ucp_worker_destroy(worker_);
    ucp_cleanup(context_);
  }
  BareUcx(const BareUcx&) = delete;
  BareUcx& operator=(const BareUcx&) = delete;

  std::string Address() {
    ucp_address_t* address = nullptr;
    size_t bytes = 0;
    Expect(ucp_worker_get_address(worker_, &address, &bytes) == UCS_OK, "address");
    std::string copy(reinterpret_cast<char*>(address), bytes);
    ucp_worker_release_address(worker_, address);
    return copy;
  }
  void Connect(const std::string& address) {
    ucp_ep_params_t params{};
    params.field_mask = UCP_EP_PARAM_FIELD_REMOTE_ADDRESS | UCP_EP_PARAM_FIELD_ERR_HANDLING_MODE |
                        UCP_EP_PARAM_FIELD_ERR_HANDLER;
    params.address = reinterpret_cast<const ucp_address_t*>(address.data());
    params.err_mode = UCP_ERR_HANDLING_MODE_PEER;
    params.err_handler.cb = [](void*, ucp_ep_h, ucs_status_t) {};
    Expect(ucp_ep_create(worker_, &params, &endpoint_) == UCS_OK, "ucp_ep_create");
  }
  void Progress() { ucp_worker_progress(worker_); }

  // Registers memory that is read, or read into; its key.
  std::string Register(std::span<std::byte> memory) {
    ucp_mem_map_params_t params{};
    params.field_mask = UCP_MEM_MAP_PARAM_FIELD_ADDRESS | UCP_MEM_MAP_PARAM_FIELD_LENGTH;
    params.address = memory.data();
    params.length = memory.size();
    Expect(ucp_mem_map(context_, &params, &memory_) == UCS_OK, "ucp_mem_map");
    void* key = nullptr;
    size_t bytes = 0;
    Expect(ucp_rkey_pack(context_, memory_, &key, &bytes) == UCS_OK, "ucp_rkey_pack");
    std::string copy(static_cast<char*>(key), bytes);
    ucp_rkey_buffer_release(key);
    return copy;
  }
  void UseKey(const std::string& key) {
    Expect(ucp_ep_rkey_unpack(endpoint_, key.data(), &key_) == UCS_OK, "ucp_ep_rkey_unpack");
  }
  void Get(std::span<std::byte> into, uint64_t remote) {
    ucp_request_param_t param = Counted();
#if UCP_API_VERSION >= UCP_VERSION(1, 14)
    param.op_attr_mask |= UCP_OP_ATTR_FIELD_MEMH;
    param.memh = memory_;
#endif
    Count(ucp_get_nbx(endpoint_, into.data(), into.size(), remote, key_, &param));
  }
  void Send(std::span<const std::byte> data) {
    ucp_request_param_t param = Counted();
    param.op_attr_mask |= UCP_OP_ATTR_FIELD_FLAGS;
    param.flags = UCP_AM_SEND_FLAG_EAGER;
    Count(ucp_am_send_nbx(endpoint_, 1, nullptr, 0, data.data(), data.size(), &param));
  }
  // Until at most `in_flight` operations are.
  void Wait(uint32_t in_flight) {
    while (in_flight_ > in_flight) Progress();
  }
  // Counts the bytes of messages from now on.
  void Receive() {
    ucp_am_handler_param_t handler{};
    handler.field_mask = UCP_AM_HANDLER_PARAM_FIELD_ID | UCP_AM_HANDLER_PARAM_FIELD_FLAGS |
                         UCP_AM_HANDLER_PARAM_FIELD_CB | UCP_AM_HANDLER_PARAM_FIELD_ARG;
    handler.id = 1;
    handler.flags = UCP_AM_FLAG_WHOLE_MSG;
    handler.cb = [](void* self, const void*, size_t, void*, size_t bytes,
                    const ucp_am_recv_param_t*) {
      static_cast<BareUcx*>(self)->received_ += bytes;
      return UCS_OK;
    };
    handler.arg = this;
    Expect(ucp_worker_set_am_recv_handler(worker_, &handler) == UCS_OK, "handler");
  }
  uint64_t received() const { return received_; }

 private:
  ucp_request_param_t Counted() {
    ucp_request_param_t param{};
    param.op_attr_mask = UCP_OP_ATTR_FIELD_CALLBACK | UCP_OP_ATTR_FIELD_USER_DATA;
    param.cb.send = [](void* request, ucs_status_t status, void* in_flight) {
      Expect(status == UCS_OK, "an operation failed");
      --*static_cast<uint32_t*>(in_flight);
      ucp_request_free(request);
    };
    param.user_data = &in_flight_;
    return param;
  }
  void Count(ucs_status_ptr_t request) {
    Expect(!UCS_PTR_IS_ERR(request), "an operation failed");
    if (request != nullptr) ++in_flight_;
  }

  ucp_context_h context_ = nullptr;
  ucp_worker_h worker_ = nullptr;
  ucp_ep_h endpoint_ = nullptr;
  ucp_mem_h memory_ = nullptr;
  ucp_rkey_h key_ = nullptr;
  uint32_t in_flight_ = 0;
  uint64_t received_ = 0;
};

inline BareUcx::Settings BareGetSettings() {
  return {{"TLS", "cma,posix"},
          {"RNDV_THRESH", "inf"},
          {"PROTO_ENABLE", "y"},
          {"PROTO_EMULATION_ENABLE", "n"},
          {"POSIX_ERROR_HANDLING", "y"}};
}

inline BareUcx::Settings BareAmSettings(uint64_t message_bytes) {
  const std::string segment = std::to_string(message_bytes + 4096);
  return {{"TLS", "tcp"},
          {"NET_DEVICES", "lo"},
          {"TCP_TX_SEG_SIZE", segment},
          {"TCP_RX_SEG_SIZE", segment},
          {"RNDV_THRESH", "inf"},
          {"PROTO_ENABLE", "n"}};
}

}  // namespace kvrelay::bench
