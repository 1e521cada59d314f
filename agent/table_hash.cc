#include "agent/table_hash.h"

#include <array>
#include <cstddef>
#include <vector>

namespace kvrelay::agent {

uint64_t TableHash(const HashKey& key, std::span<const KvTable> tables, const ContentHash& hash,
                   uint32_t first_token, uint32_t tokens) {
  std::vector<std::byte> bytes;
  const auto add = [&bytes](const auto& values) {
    const auto more = std::as_bytes(std::span(values));
    bytes.insert(bytes.end(), more.begin(), more.end());
  };
  add(hash.bytes);
  add(std::array{first_token, tokens, static_cast<uint32_t>(tables.size())});
  for (const KvTable& table : tables) {
    const auto blocks = static_cast<uint32_t>(table.blocks.size());
    add(std::array{table.first_token, table.held_from, blocks});
    add(table.blocks);
  }
  return KeyedHash(key, bytes);
}

}  // namespace kvrelay::agent
