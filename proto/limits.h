// Bounds on everything that comes from the wire, checked before memory is allocated for it. Both
// sides have the same ones: what exceeds them can not be sent either (the caller gets kTooLarge or
// kInvalidArgument, not a dead connection).
#pragma once

#include <cstdint>

namespace kvrelay::proto {

inline constexpr uint64_t kMaxMessageBytes = 8ULL << 20;            // envelope with its body
inline constexpr uint64_t kMaxBodyBytes = kMaxMessageBytes - 1024;  // the rest is the envelope's
inline constexpr uint32_t kMaxNesting = 8;         // maps and arrays inside each other
inline constexpr uint32_t kMaxMapFields = 256;     // unknown fields included
inline constexpr uint32_t kMaxObjects = 3U << 20;  // values in one message, counted together

inline constexpr uint64_t kMaxName = 256;  // model, transport, device, role, version, request id
inline constexpr uint64_t kMaxEndpoint = 256;     // "tcp://host:port"
inline constexpr uint64_t kMaxAddress = 4096;     // a transport's opaque address
inline constexpr uint64_t kMaxErrorText = 4096;   // messages and reasons
inline constexpr uint64_t kMaxText = 4ULL << 20;  // prompts, generated text, JSON

inline constexpr uint32_t kMaxTokens =
    1U << 20;  // of one request; also the length of an array of token ids
inline constexpr uint32_t kMaxBlocks = 1U << 20;  // of one request
inline constexpr uint32_t kMaxBlockSize = 1U << 16;
inline constexpr uint32_t kMaxLayers = 1024;
inline constexpr uint32_t kMaxHeads = 4096;
inline constexpr uint32_t kMaxHeadDim = 65536;
inline constexpr uint32_t kMaxKinds = 64;         // of layers in one model
inline constexpr uint32_t kMaxScales = 1U << 18;  // of K, or of V
inline constexpr uint32_t kMaxRanks = 1024;
inline constexpr uint32_t kMaxRegions = 4096;
inline constexpr uint32_t kMaxTransports = 16;
inline constexpr uint32_t kMaxPrefixes = 16;      // of one ticket
inline constexpr uint32_t kMaxReuse = 1;          // of one PREFILL
inline constexpr uint32_t kMaxLeases = 1U << 16;  // named by one RELEASE or HEARTBEAT
inline constexpr uint32_t kMaxStopIds = 1024;
inline constexpr uint32_t kMaxDurationMs = 24U * 3600 * 1000;
inline constexpr uint64_t kMaxChunkBytes = 1ULL << 30;

}  // namespace kvrelay::proto
