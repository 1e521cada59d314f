#include "agent/table_hash.h"

#include <cstring>
#include <vector>

namespace kvrelay::agent {

uint64_t TableHash(const HashKey& key, std::span<const BlockId> blocks, const ContentHash& hash,
                   uint32_t first_token, uint32_t tokens) {
  const uint32_t range[2] = {first_token, tokens};
  std::vector<std::byte> bytes(hash.bytes.size() + sizeof(range) + blocks.size_bytes());
  std::byte* out = bytes.data();
  std::memcpy(out, hash.bytes.data(), hash.bytes.size());
  out += hash.bytes.size();
  std::memcpy(out, range, sizeof(range));
  out += sizeof(range);
  if (!blocks.empty()) std::memcpy(out, blocks.data(), blocks.size_bytes());
  return KeyedHash(key, bytes);
}

}  // namespace kvrelay::agent
