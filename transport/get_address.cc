#include "transport/get_address.h"

#include "transport/address_codec.h"

namespace kvrelay::transport {
namespace {

constexpr std::string_view kGetAddressMagic = "kvrelay-get-1";
constexpr size_t kMaxKeyBytes = 512;

void Put(AddressWriter& out, const GetAddress::Span& span) {
  out.Number(span.base).Number(span.bytes).Text(span.key);
}

GetAddress::Span Take(AddressReader& in) {
  GetAddress::Span span;
  span.base = in.Number();
  span.bytes = in.Number();
  span.key = in.Text(kMaxKeyBytes);
  return span;
}

}  // namespace

Address GetAddress::Encode() const {
  AddressWriter out(kGetAddressMagic);
  out.Number(incarnation).Text(library).Text(host.host_id).Number(host.uid).Text(worker);
  Put(out, beacon);
  out.Number(regions.size());
  for (const Span& region : regions) Put(out, region);
  return out.Finish();
}

Result<GetAddress> GetAddress::Decode(std::string_view bytes) {
  const Status bad(Code::kInvalidArgument, "not an address of ucx-get");
  AddressReader in(bytes, kGetAddressMagic);
  GetAddress address;
  address.incarnation = in.Number();
  address.library = in.Text(kMaxLibraryBytes);
  address.host.host_id = in.Text(HostIdentity::kMaxHostId);
  address.host.uid = static_cast<uid_t>(in.Number());
  address.worker = in.Text(kMaxWorkerBytes);
  address.beacon = Take(in);
  const uint64_t count = in.Number();
  if (count > kMaxRegions) return Error(bad);
  for (uint64_t i = 0; i < count; ++i) address.regions.push_back(Take(in));
  if (!in.Finish() || address.worker.empty() || address.beacon.bytes != sizeof(Beacon)) {
    return Error(bad);
  }
  return address;
}

}  // namespace kvrelay::transport
