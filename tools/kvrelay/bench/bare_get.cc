#include "tools/kvrelay/bench/bare_get.h"

#include <chrono>
#include <cstring>
#include <stop_token>

namespace kvrelay::tools {
namespace {

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

Result<std::unique_ptr<BareGet>> BareGet::Create(std::span<std::byte> memory) {
  KVRELAY_ASSIGN_OR_RETURN(auto worker, BareWorker::Create(UCP_FEATURE_RMA, {}));
  std::unique_ptr<BareGet> bare(new BareGet(memory, std::move(worker)));
  ucp_mem_map_params_t map{};
  map.field_mask = UCP_MEM_MAP_PARAM_FIELD_ADDRESS | UCP_MEM_MAP_PARAM_FIELD_LENGTH;
  map.address = memory.data();
  map.length = memory.size();
  KVRELAY_RETURN_IF_ERROR(
      CheckUcx(ucp_mem_map(bare->worker_->context(), &map, &bare->handle_), "ucp_mem_map"));
  return bare;
}

BareGet::~BareGet() {
  if (remote_key_ != nullptr) ucp_rkey_destroy(remote_key_);
  if (handle_ != nullptr) ucp_mem_unmap(worker_->context(), handle_);
}

Result<std::string> BareGet::Invitation() const {
  std::string text;
  KVRELAY_ASSIGN_OR_RETURN(const std::string address, worker_->Address());
  Append(text, address.data(), address.size());
  size_t bytes = 0;
  void* key = nullptr;
  KVRELAY_RETURN_IF_ERROR(
      CheckUcx(ucp_rkey_pack(worker_->context(), handle_, &key, &bytes), "ucp_rkey_pack"));
  Append(text, key, bytes);
  ucp_rkey_buffer_release(key);
  const auto base = reinterpret_cast<uint64_t>(memory_.data());
  Append(text, &base, sizeof(base));
  return text;
}

Status BareGet::Connect(const std::string& invitation) {
  std::string_view rest = invitation;
  KVRELAY_ASSIGN_OR_RETURN(const std::string address, Take(rest));
  KVRELAY_ASSIGN_OR_RETURN(const std::string key, Take(rest));
  KVRELAY_ASSIGN_OR_RETURN(const std::string base, Take(rest));
  std::memcpy(&remote_, base.data(), sizeof(remote_));
  KVRELAY_RETURN_IF_ERROR(worker_->Connect(address, UCP_ERR_HANDLING_MODE_NONE));
  return CheckUcx(ucp_ep_rkey_unpack(worker_->endpoint(), key.data(), &remote_key_),
                  "ucp_ep_rkey_unpack");
}

Status BareGet::Get(const PullCase& pull) {
  ucp_request_param_t params{};
  params.op_attr_mask = UCP_OP_ATTR_FIELD_MEMH;
  params.memh = handle_;
  for (const CopySegment& slice : pull.slices) {
    void* const get = ucp_get_nbx(worker_->endpoint(), memory_.data() + slice.dst, pull.slice_bytes,
                                  remote_ + slice.src, remote_key_, &params);
    if (UCS_PTR_IS_ERR(get)) return CheckUcx(UCS_PTR_STATUS(get), "ucp_get_nbx");
    if (get != nullptr) ucp_request_free(get);  // the flush waits for it all the same
  }
  return worker_->Flush();
}

Result<std::unique_ptr<BareGetOwner>> BareGetOwner::Start(std::span<std::byte> memory) {
  std::unique_ptr<BareGetOwner> owner(new BareGetOwner);
  KVRELAY_ASSIGN_OR_RETURN(owner->get_, BareGet::Create(memory));
  KVRELAY_ASSIGN_OR_RETURN(owner->invitation_, owner->get_->Invitation());
  owner->thread_ = std::jthread([get = owner->get_.get()](const std::stop_token& stop) {
    while (!stop.stop_requested()) {
      get->Progress();
      std::this_thread::sleep_for(std::chrono::milliseconds(2));
    }
  });
  return owner;
}

}  // namespace kvrelay::tools
