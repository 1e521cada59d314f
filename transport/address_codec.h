// How transports write down where they can be reached: a magic text, numbers and texts, a checksum.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>

#include "transport/transport.h"

namespace kvrelay::transport {

// Of the library's name and version that an address says: "ucx 1.22.0".
inline constexpr size_t kMaxLibraryBytes = 32;

// FNV-1a. Finds damage and foreign bytes; who may send is decided elsewhere.
uint64_t Checksum(const void* data, size_t bytes);

class AddressWriter {
 public:
  explicit AddressWriter(std::string_view magic) : out_(magic) {}
  AddressWriter& Number(uint64_t value);
  AddressWriter& Text(std::string_view text);
  Address Finish();

 private:
  Address out_;
};

// The same fields in the same order. After a failure every field reads as empty, and Finish says
// so.
class AddressReader {
 public:
  AddressReader(std::string_view bytes, std::string_view magic);
  uint64_t Number();
  std::string Text(size_t max_bytes);
  // True when everything was there, and nothing else.
  bool Finish() const { return ok_ && rest_.empty(); }

 private:
  std::string_view rest_;
  bool ok_ = false;
};

}  // namespace kvrelay::transport
