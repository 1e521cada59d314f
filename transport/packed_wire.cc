#include "transport/packed_wire.h"

#include <cstring>

#include "transport/address_codec.h"

namespace kvrelay::transport {
namespace {

constexpr uint64_t kHeaderMagic = 0x4b43504b52564bULL;  // "KVRKPCK"
constexpr uint16_t kHeaderVersion = 1;
constexpr std::string_view kPackedAddressMagic = "kvrelay-packed-1";

uint64_t ChecksumOf(const PackedHeader& header) {
  return Checksum(&header, offsetof(PackedHeader, checksum));
}

}  // namespace

void Seal(PackedHeader& header) {
  header.magic = kHeaderMagic;
  header.version = kHeaderVersion;
  header.checksum = ChecksumOf(header);
}

Result<PackedHeader> CheckHeader(std::span<const std::byte> bytes, uint64_t data_bytes) {
  PackedHeader header;
  if (bytes.size() != sizeof(header)) {
    return Error(Code::kInvalidArgument, "a header of " + std::to_string(bytes.size()) + " bytes");
  }
  std::memcpy(&header, bytes.data(), sizeof(header));
  if (header.magic != kHeaderMagic || header.version != kHeaderVersion ||
      header.checksum != ChecksumOf(header)) {
    return Error(Code::kInvalidArgument, "not a header of this protocol");
  }
  if (header.bytes != data_bytes) {
    return Error(Code::kInvalidArgument, "a message of " + std::to_string(data_bytes) +
                                             " bytes whose header says " +
                                             std::to_string(header.bytes));
  }
  return header;
}

std::string PackedAddress::Encode() const {
  return AddressWriter(kPackedAddressMagic).Number(incarnation).Text(library).Text(worker).Finish();
}

Result<PackedAddress> PackedAddress::Decode(std::string_view bytes) {
  AddressReader in(bytes, kPackedAddressMagic);
  PackedAddress address;
  address.incarnation = in.Number();
  address.library = in.Text(kMaxLibraryBytes);
  address.worker = in.Text(kMaxWorkerBytes);
  if (!in.Finish() || address.worker.empty()) {
    return Error(Code::kInvalidArgument, "not an address of a packed transport");
  }
  return address;
}

}  // namespace kvrelay::transport
