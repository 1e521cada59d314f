#include "transport/address_codec.h"

#include <cstring>

namespace kvrelay::transport {

uint64_t Checksum(const void* data, size_t bytes) {
  const auto* byte = static_cast<const unsigned char*>(data);
  uint64_t sum = 0xcbf29ce484222325ULL;
  for (size_t i = 0; i < bytes; ++i) sum = (sum ^ byte[i]) * 0x100000001b3ULL;
  return sum;
}

AddressWriter& AddressWriter::Number(uint64_t value) {
  out_.append(reinterpret_cast<const char*>(&value), sizeof(value));
  return *this;
}

AddressWriter& AddressWriter::Text(std::string_view text) {
  Number(text.size());
  out_ += text;
  return *this;
}

Address AddressWriter::Finish() {
  Number(Checksum(out_.data(), out_.size()));
  return std::move(out_);
}

AddressReader::AddressReader(std::string_view bytes, std::string_view magic) {
  if (bytes.size() < magic.size() + sizeof(uint64_t) || !bytes.starts_with(magic)) return;
  const size_t sealed = bytes.size() - sizeof(uint64_t);
  uint64_t sum = 0;
  std::memcpy(&sum, bytes.data() + sealed, sizeof(sum));
  ok_ = sum == Checksum(bytes.data(), sealed);
  if (ok_) rest_ = bytes.substr(magic.size(), sealed - magic.size());
}

uint64_t AddressReader::Number() {
  uint64_t value = 0;
  ok_ = ok_ && rest_.size() >= sizeof(value);
  if (!ok_) return 0;
  std::memcpy(&value, rest_.data(), sizeof(value));
  rest_.remove_prefix(sizeof(value));
  return value;
}

std::string AddressReader::Text(size_t max_bytes) {
  const uint64_t bytes = Number();
  ok_ = ok_ && bytes <= max_bytes && bytes <= rest_.size();
  if (!ok_) return {};
  std::string text(rest_.substr(0, bytes));
  rest_.remove_prefix(bytes);
  return text;
}

}  // namespace kvrelay::transport
