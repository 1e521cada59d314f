#include "transport/ucx_memory.h"

#include <cstring>
#include <vector>

namespace kvrelay::transport {

Result<std::unique_ptr<UcxMemory>> UcxMemory::Register(std::shared_ptr<UcxContext> context,
                                                       std::span<std::byte> memory) {
  ucp_mem_map_params_t params{};
  params.field_mask = UCP_MEM_MAP_PARAM_FIELD_ADDRESS | UCP_MEM_MAP_PARAM_FIELD_LENGTH;
  params.address = memory.data();
  params.length = memory.size();
  ucp_mem_h handle = nullptr;
  if (const ucs_status_t status = ucp_mem_map(context->get(), &params, &handle); status != UCS_OK) {
    return Error(Code::kResourceExhausted, "UCX can not register " + std::to_string(memory.size()) +
                                               " bytes: " + ucs_status_string(status));
  }
  return std::unique_ptr<UcxMemory>(new UcxMemory(std::move(context), handle));
}

Result<std::string> UcxMemory::Key() const {
  void* buffer = nullptr;
  size_t bytes = 0;
  if (const ucs_status_t status = ucp_rkey_pack(context_->get(), handle_, &buffer, &bytes);
      status != UCS_OK) {
    return Error(Code::kInternal, std::string("ucp_rkey_pack: ") + ucs_status_string(status));
  }
  std::string key(static_cast<const char*>(buffer), bytes);
  ucp_rkey_buffer_release(buffer);
  return key;
}

Result<UcxRemoteKey> UcxRemoteKey::Unpack(ucp_ep_h endpoint, std::string_view key) {
  // As with addresses, UCX does not know where a damaged one ends.
  constexpr size_t kPadding = 4096;
  std::vector<char> padded(key.size() + kPadding);
  std::memcpy(padded.data(), key.data(), key.size());
  ucp_rkey_h handle = nullptr;
  if (const ucs_status_t status = ucp_ep_rkey_unpack(endpoint, padded.data(), &handle);
      status != UCS_OK) {
    return Error(Code::kPeerUnreachable,
                 std::string("the peer's memory key: ") + ucs_status_string(status));
  }
  return UcxRemoteKey(handle);
}

}  // namespace kvrelay::transport
