#include "kvcache/lease_record.h"

#include <algorithm>
#include <cassert>

namespace kvrelay {
namespace {

constexpr uint32_t kTokenBits = 28;
constexpr uint32_t kLayerBits = 8;

uint64_t Live(uint64_t epoch) { return epoch << 1 | 1; }

// The order of loads matters, and an acquire load keeps everything behind it: w0 comes first (see
// ReadBefore and ReadAfter).
GuardWords LoadInOrder(const std::array<std::atomic<uint64_t>, 4>& w) {
  GuardWords words;
  words.w0 = w[0].load(std::memory_order_acquire);
  words.w1 = w[1].load(std::memory_order_acquire);
  words.w2 = w[2].load(std::memory_order_acquire);
  words.w3 = w[3].load(std::memory_order_acquire);
  return words;
}

}  // namespace

uint64_t Progress::Pack() const {
  // Saturated, not masked: a number that is too large must not look like a small one of another
  // time.
  const uint64_t most_tokens = (uint64_t{1} << kTokenBits) - 1;
  const uint64_t most_layers = (uint64_t{1} << kLayerBits) - 1;
  return std::min<uint64_t>(tokens, most_tokens) << (kTokenBits + kLayerBits) |
         std::min<uint64_t>(chunk_end, most_tokens) << kLayerBits |
         std::min<uint64_t>(layers, most_layers);
}

Progress Progress::Unpack(uint64_t word) {
  const uint64_t token_mask = (uint64_t{1} << kTokenBits) - 1;
  const uint64_t layer_mask = (uint64_t{1} << kLayerBits) - 1;
  return {static_cast<uint32_t>(word >> (kTokenBits + kLayerBits)),
          static_cast<uint32_t>(word >> kLayerBits & token_mask),
          static_cast<uint32_t>(word & layer_mask)};
}

bool Covers(const Progress& progress, const KvExtent& extent) {
  return progress.tokens >= extent.tokens ||
         (progress.chunk_end >= extent.tokens && progress.layers >= extent.layers);
}

bool IsLease(const GuardExpectation& want, const GuardWords& words) {
  return words.w0 == Live(want.epoch) && words.w2 == want.incarnation &&
         words.w3 == want.table_hash;
}

bool GuardHolds(const GuardExpectation& want, const GuardWords& before, const GuardWords& after) {
  // Progress counts as of the first read: a token that was finished after the data was loaded may
  // have been loaded half done.
  return IsLease(want, before) && IsLease(want, after) &&
         Covers(Progress::Unpack(before.w1), want.extent);
}

void LeaseRecord::Start(uint64_t epoch, Incarnation incarnation, uint64_t table_hash) {
  assert(!live());
  w[1].store(0, std::memory_order_relaxed);
  w[2].store(incarnation, std::memory_order_relaxed);
  w[3].store(table_hash, std::memory_order_relaxed);
  w[0].store(Live(epoch), std::memory_order_release);
}

void LeaseRecord::Publish(Progress progress) {
  w[1].store(progress.Pack(), std::memory_order_release);
}

void LeaseRecord::End() {
  w[0].store(w[0].load(std::memory_order_relaxed) & ~uint64_t{1}, std::memory_order_relaxed);
  // A release store would order what is before it. The next lease's KV comes after, and must stay
  // there.
  std::atomic_thread_fence(std::memory_order_seq_cst);
}

GuardWords LeaseRecord::ReadBefore() const { return LoadInOrder(w); }

GuardWords LeaseRecord::ReadAfter() const {
  // Keeps the data loads, which are not atomic, before the loads of the words.
  std::atomic_thread_fence(std::memory_order_acquire);
  return LoadInOrder(w);
}

}  // namespace kvrelay
