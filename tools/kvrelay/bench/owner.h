// The owner's process of `kvrelay bench pull`: memory to pull from, and what its side of each way
// has to do.
#pragma once

#include <cstdint>
#include <string>

#include "tools/kvrelay/bench/channel.h"

namespace kvrelay::tools {

// Chunks of packed streams.
inline constexpr uint64_t kBenchChunkBytes = transport::kDefaultChunkBytes;

// What the reader asks for. Each is answered by a byte, when it is ready (kPrepare) or right after
// it was understood (the streams), or not at all (kQuit). After kBareStream the reader sends a byte
// when all has come.
struct OwnerRequest {
  enum class Kind : uint32_t { kPrepare, kStream, kSocket, kBareStream, kQuit } kind = Kind::kQuit;
  uint32_t way = 0;          // kPrepare: of Side::ways()
  uint64_t stream = 0;       // kPrepare: sent by the next kStream
  uint64_t slice_bytes = 0;  // kPrepare: the case
  uint32_t set = 0;
  uint64_t count = 0;
  uint64_t bytes = 0;  // kSocket: so many into the plain socket; kBareStream: in messages
};

// Runs until the reader is gone or says kQuit. First exchanges specs, by way in the order of
// Side::ways(): ours, then theirs; then what BareGetOwner says; then the address of their
// BareReceiver, empty where there is none; then the descriptor of our memory.
// `socket`: a plain TCP connection to the reader.
Status RunOwner(Channel& reader, UniqueFd socket, const std::string& run_dir,
                uint64_t memory_bytes);

}  // namespace kvrelay::tools
