#include "transport/packed_wire.h"

#include <cstring>

namespace kvrelay::transport {
namespace {

constexpr uint64_t kHeaderMagic = 0x4b43504b52564bULL;  // "KVRKPCK"
constexpr uint16_t kHeaderVersion = 1;
constexpr std::string_view kAddressMagic = "kvrelay-packed-1";
constexpr size_t kMaxLibraryBytes = 32;
constexpr size_t kMaxWorkerBytes = 4096;

// FNV-1a. Finds damage and foreign bytes; who may send is decided elsewhere.
uint64_t Checksum(const void* data, size_t bytes) {
  const auto* byte = static_cast<const unsigned char*>(data);
  uint64_t sum = 0xcbf29ce484222325ULL;
  for (size_t i = 0; i < bytes; ++i) sum = (sum ^ byte[i]) * 0x100000001b3ULL;
  return sum;
}

uint64_t ChecksumOf(const PackedHeader& header) {
  return Checksum(&header, offsetof(PackedHeader, checksum));
}

void PutNumber(std::string& out, uint64_t value) {
  out.append(reinterpret_cast<const char*>(&value), sizeof(value));
}

uint64_t TakeNumber(std::string_view& rest) {
  uint64_t value = 0;
  std::memcpy(&value, rest.data(), sizeof(value));
  rest.remove_prefix(sizeof(value));
  return value;
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

// magic, incarnation, length and bytes of library, then of worker, checksum of all that.
std::string PackedAddress::Encode() const {
  std::string out(kAddressMagic);
  PutNumber(out, incarnation);
  for (const std::string* part : {&library, &worker}) {
    PutNumber(out, part->size());
    out += *part;
  }
  PutNumber(out, Checksum(out.data(), out.size()));
  return out;
}

Result<PackedAddress> PackedAddress::Decode(std::string_view bytes) {
  const Status bad(Code::kInvalidArgument, "not an address of a packed transport");
  constexpr size_t kFixedBytes = kAddressMagic.size() + 4 * sizeof(uint64_t);
  if (bytes.size() < kFixedBytes || !bytes.starts_with(kAddressMagic)) return Error(bad);
  std::string_view tail = bytes.substr(bytes.size() - sizeof(uint64_t));
  std::string_view rest = bytes.substr(0, bytes.size() - sizeof(uint64_t));
  if (TakeNumber(tail) != Checksum(rest.data(), rest.size())) return Error(bad);

  PackedAddress address;
  rest.remove_prefix(kAddressMagic.size());
  address.incarnation = TakeNumber(rest);
  const uint64_t library_bytes = TakeNumber(rest);
  if (library_bytes > kMaxLibraryBytes || library_bytes + sizeof(uint64_t) > rest.size()) {
    return Error(bad);
  }
  address.library = rest.substr(0, library_bytes);
  rest.remove_prefix(library_bytes);
  if (TakeNumber(rest) != rest.size() || rest.empty() || rest.size() > kMaxWorkerBytes) {
    return Error(bad);
  }
  address.worker = rest;
  return address;
}

}  // namespace kvrelay::transport
