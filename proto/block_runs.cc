#include "proto/block_runs.h"

#include <optional>

namespace kvrelay::proto {
namespace {

constexpr int kVarintBits = 7;

// Little-endian base 128; all but the last byte have the high bit.
void PutVarint(std::string& out, uint64_t value) {
  for (; value >= 1U << kVarintBits; value >>= kVarintBits) {
    out.push_back(static_cast<char>(value | (1U << kVarintBits)));
  }
  out.push_back(static_cast<char>(value));
}

// Takes it from the front of `bytes`. None when they end inside it, or it is longer than a run
// needs.
std::optional<uint64_t> TakeVarint(std::string_view& bytes) {
  constexpr int kMaxBits = 35;  // sign, flag and 32 bits
  uint64_t value = 0;
  for (int shift = 0; shift < kMaxBits && !bytes.empty(); shift += kVarintBits) {
    const auto byte = static_cast<uint8_t>(bytes.front());
    bytes.remove_prefix(1);
    value |= uint64_t{byte & 0x7fU} << shift;
    if (byte < 1U << kVarintBits) return value;
  }
  return std::nullopt;
}

// 0, -1, 1, -2, ... as 0, 1, 2, 3, ...
uint64_t Zigzag(int64_t value) {
  return value < 0 ? (~static_cast<uint64_t>(value) << 1) | 1 : static_cast<uint64_t>(value) << 1;
}
int64_t Unzigzag(uint64_t value) {
  const auto half = static_cast<int64_t>(value >> 1);
  return (value & 1) != 0 ? ~half : half;
}

}  // namespace

std::string PackBlocks(std::span<const BlockId> blocks) {
  std::string out;
  int64_t expected = 0;
  for (size_t i = 0; i < blocks.size();) {
    size_t end = i + 1;
    while (end < blocks.size() && blocks[end] == uint64_t{blocks[end - 1]} + 1) ++end;
    const bool several = end - i > 1;
    PutVarint(out, Zigzag(int64_t{blocks[i]} - expected) << 1 | (several ? 1 : 0));
    if (several) PutVarint(out, end - i - 2);
    expected = int64_t{blocks[end - 1]} + 1;
    i = end;
  }
  return out;
}

Result<std::vector<BlockId>> UnpackBlocks(std::string_view bytes, size_t max) {
  std::vector<BlockId> blocks;
  int64_t expected = 0;
  while (!bytes.empty()) {
    const std::optional<uint64_t> start = TakeVarint(bytes);
    const bool several = start && (*start & 1) != 0;
    const std::optional<uint64_t> rest = several ? TakeVarint(bytes) : 0;
    if (!start || !rest) return Error(Code::kInvalidArgument, "has a run of blocks cut short");
    const uint64_t count = several ? *rest + 2 : 1;
    if (count > max - blocks.size()) {
      return Error(Code::kInvalidArgument, "has more than " + std::to_string(max) + " blocks");
    }
    const int64_t first = expected + Unzigzag(*start >> 1);
    expected = first + static_cast<int64_t>(count);
    if (first < 0 || expected - 1 > int64_t{UINT32_MAX}) {
      return Error(Code::kInvalidArgument, "has a block id outside 32 bits");
    }
    for (int64_t block = first; block < expected; ++block) {
      blocks.push_back(static_cast<BlockId>(block));
    }
  }
  return blocks;
}

}  // namespace kvrelay::proto
