// What crosses the Unix socket of `mapped`, as fixed structs of one host: the reader sends one
// Hello, the owner answers with RegionBatch messages whose descriptors travel beside them. Nothing
// follows; the open socket is the liveness signal.
#pragma once

#include <cstdint>

#include "kvcache/region.h"
#include "transport/unix_socket.h"

namespace kvrelay::transport::mapped {

inline constexpr uint64_t kMagic = 0x3250414d'52564bULL;  // "KVRMAP2"

struct Hello {
  uint64_t magic = kMagic;
  uint64_t nonce = 0;        // from the owner's address: this socket is the one that was meant
  uint64_t incarnation = 0;  // of the owner, as the reader knows it
};

enum class Answer : uint32_t { kRegions = 0, kOtherIncarnation = 1 };

struct RegionBatch {
  uint64_t magic = kMagic;
  Answer answer = Answer::kRegions;
  uint32_t total_regions = 0;
  uint32_t first_region = 0;  // batches come in order
  uint32_t count = 0;         // regions, and descriptors, in this batch
  uint64_t bytes[kMaxFdsPerMessage] = {};
  DeviceKind device[kMaxFdsPerMessage] = {};
};

inline constexpr uint32_t kMaxRegions = 4096;

}  // namespace kvrelay::transport::mapped
