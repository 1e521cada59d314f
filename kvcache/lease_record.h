// The lease record: four 8-byte words in registered host memory, each atomic alone, through which a
// reader that shares nothing else with the owner proves that the bytes it copied were the bytes of
// its lease (ARCHITECTURE section 5 of the design; the orderings below are the rules that the
// models in tests/proof remove one by one).
#pragma once

#include <array>
#include <atomic>
#include <cstdint>

#include "base/ids.h"

namespace kvrelay {

// How far the prompt is computed. Monotonic as a number (see Pack).
struct Progress {
  uint32_t tokens = 0;     // complete in all layers
  uint32_t chunk_end = 0;  // end of the chunk in work (>= tokens)
  uint32_t layers = 0;     // layers done of that chunk
  bool operator==(const Progress&) const = default;

  // tokens:28 | chunk_end:28 | layers:8
  uint64_t Pack() const;
  static Progress Unpack(uint64_t word);
};

// The KV of all tokens before `tokens`, in the first `layers` layers of the owner's shard.
struct KvExtent {
  static constexpr uint32_t kAllLayers = UINT32_MAX;
  uint32_t tokens = 0;
  uint32_t layers = kAllLayers;
  bool operator==(const KvExtent&) const = default;
};
// Whether it is computed.
bool Covers(const Progress& progress, const KvExtent& extent);

// A snapshot of the four words, as loaded.
struct GuardWords {
  uint64_t w0 = 0;  // epoch << 1 | live
  uint64_t w1 = 0;  // Progress
  uint64_t w2 = 0;  // incarnation of the owner rank's process
  uint64_t w3 = 0;  // keyed hash of (block table, prompt hash, token count)
  bool operator==(const GuardWords&) const = default;
};

// What a reader expects of its lease; w0 is always live.
struct GuardExpectation {
  uint64_t epoch = 0;
  Incarnation incarnation = 0;
  uint64_t table_hash = 0;
  KvExtent extent;  // w1 of the FIRST read must cover it
};

// Whether the words are those of the lease, however far it is computed.
bool IsLease(const GuardExpectation& want, const GuardWords& words);
// Whether bytes read between `before` and `after` are the lease's.
bool GuardHolds(const GuardExpectation& want, const GuardWords& before, const GuardWords& after);

struct alignas(64) LeaseRecord {
  std::array<std::atomic<uint64_t>, 4> w{};

  // Owner's control thread. The record is dead on entry. Publishes w1 = 0, w2, w3, then (release)
  // w0 = live.
  void Start(uint64_t epoch, Incarnation incarnation, uint64_t table_hash);
  // Engine thread that wrote the KV; KV written before is visible to who sees the new w1 (release).
  void Publish(Progress progress);
  // Owner's control thread. w0 = dead, then a full fence: what is stored after End (the next
  // lease's KV) can not become visible before it. Idempotent.
  void End();
  bool live() const { return (w[0].load(std::memory_order_acquire) & 1U) != 0; }

  // Reader (also over a read-only mapping). The first read is acquire. The second read starts with
  // an acquire fence, which orders the data loads before it, and loads w0 (acquire) before w2 and
  // w3.
  GuardWords ReadBefore() const;
  GuardWords ReadAfter() const;
};
static_assert(sizeof(LeaseRecord) == 64);
static_assert(std::atomic<uint64_t>::is_always_lock_free);

}  // namespace kvrelay
