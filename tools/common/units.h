// Numbers for people, and back.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>

#include "base/status.h"

namespace kvrelay::tools {

std::string FormatBytes(uint64_t bytes);  // "512 B", "1.5 KiB", "64 MiB"
std::string FormatMillis(double ms);      // "85 us", "1.24 ms", "3.2 s", "4 min 10 s", "2 h 5 min"
std::string FormatCount(uint64_t count);  // "1,234,567"

// "4096", "512MiB", "1.5GiB"; KiB, MiB, GiB, TiB are powers of 1024, kB, MB, GB, TB of 1000.
Result<uint64_t> ParseBytes(std::string_view text);

// How much cache to allocate: so many blocks, or as many as fit in so many bytes.
struct BlockBudget {
  uint64_t blocks = 0;  // 0: use `bytes`
  uint64_t bytes = 0;
};
// A bare number is blocks, one with a unit is bytes; neither may be 0.
Result<BlockBudget> ParseBlockBudget(std::string_view text);

}  // namespace kvrelay::tools
