#include "transport/get_way.h"

#include <algorithm>
#include <utility>

#include "transport/ucx_version.h"

namespace kvrelay::transport {

Result<std::shared_ptr<GetWay>> GetWay::Open(UcxWorker& worker, const PeerSpec& spec,
                                             const HostIdentity* self) {
  KVRELAY_ASSIGN_OR_RETURN(const GetAddress address, GetAddress::Decode(spec.address));
  KVRELAY_RETURN_IF_ERROR(CheckSameRelease(address.library));
  if (self != nullptr) KVRELAY_RETURN_IF_ERROR(CheckSameHost(address.host, *self));
  bool fits =
      address.incarnation == spec.incarnation && address.regions.size() == spec.region_bytes.size();
  for (size_t i = 0; fits && i < address.regions.size(); ++i) {
    fits = address.regions[i].bytes == spec.region_bytes[i];
  }
  if (!fits) {
    return Error(Code::kInvalidArgument,
                 "the address is one of another process than the handshake's, or of other regions");
  }
  std::shared_ptr<GetWay> way(new GetWay(worker, spec));
  KVRELAY_ASSIGN_OR_RETURN(way->endpoint_, UcxEndpoint::Create(worker, address.worker));
  std::vector<const GetAddress::Span*> spans = {&address.beacon};
  for (const GetAddress::Span& region : address.regions) spans.push_back(&region);
  for (const GetAddress::Span* span : spans) {
    Result<UcxRemoteKey> key = UcxRemoteKey::Unpack(way->endpoint_->get(), span->key);
    if (!key.has_value()) {
      way->End(key.error(), {});
      return way;
    }
    way->bases_.push_back(span->base);
    way->keys_.push_back(std::move(*key));
  }
  return way;
}

void GetWay::End(Status why, TimePoint close_by) {
  if (ended()) {
    close_by_ = std::min(close_by_, close_by);
    return;
  }
  why_ended_ = std::move(why);
  close_by_ = close_by;
}

void GetWay::Close() {
  endpoint_->Close();
  worker_.Flush([way = shared_from_this()] { way->closed_ = true; });
}

}  // namespace kvrelay::transport
