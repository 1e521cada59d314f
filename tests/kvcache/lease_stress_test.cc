// An owner that gives lease after lease over the same block and record slot, and a reader that
// copies optimistically: what the guard lets pass must be the bytes of that lease.
#include <gtest/gtest.h>

#include <array>
#include <atomic>
#include <chrono>
#include <cstring>
#include <mutex>
#include <new>
#include <thread>
#include <vector>

#include "base/unique_fd.h"
#include "kvcache/copy_host.h"
#include "kvcache/lease_record.h"
#include "kvcache/region.h"
#include "tests/kvcache/seed.h"

namespace kvrelay {
namespace {

using testing_support::Pick;
using testing_support::Random;
using testing_support::TestSeed;

constexpr uint32_t kHalfTokens = 8;
constexpr uint32_t kTokens = 2 * kHalfTokens;
constexpr uint64_t kRowBytes = 96;  // not a multiple of a line, so that runs tear in their middle
constexpr uint64_t kBlockBytes = kTokens * kRowBytes;
constexpr uint64_t kReads = 150000;
constexpr Incarnation kIncarnation = 0x1234;

uint64_t TableHash(uint64_t epoch) { return epoch * 0x9e3779b97f4a7c15U; }

// The word that fills the lease's KV at word `i`: differs between leases and between places.
uint64_t Word(uint64_t epoch, uint64_t i) { return (epoch + 1) * 0xd6e8feb86659fd93U + i; }

class Owner {
 public:
  Owner(std::byte* kv, LeaseRecord* record) : kv_(kv), record_(record) {}

  // What a ticket would carry. 0: none yet.
  uint64_t offered_epoch() const { return offered_.load(std::memory_order_acquire); }

  void Run(const std::atomic<bool>& stop, uint64_t seed) {
    Random random(seed);
    for (uint64_t epoch = 1000; !stop.load(std::memory_order_relaxed); ++epoch) {
      record_->Start(epoch, kIncarnation, TableHash(epoch));
      offered_.store(epoch, std::memory_order_release);
      for (uint32_t half = 0; half < 2; ++half) {
        WriteHalf(epoch, half);
        record_->Publish({(half + 1) * kHalfTokens, kTokens, 0});
      }
      // Some leases last for a few reads, some for less than one.
      const auto until =
          std::chrono::steady_clock::now() + std::chrono::nanoseconds(Pick(random, 0, 4000));
      while (std::chrono::steady_clock::now() < until) {
      }
      record_->End();
    }
  }

 private:
  void WriteHalf(uint64_t epoch, uint32_t half) {
    const uint64_t words = kBlockBytes / 2 / sizeof(uint64_t);
    for (uint64_t i = half * words; i < (half + 1) * words; ++i) {
      const uint64_t word = Word(epoch, i);
      std::memcpy(kv_ + i * sizeof(word), &word, sizeof(word));
    }
  }

  std::byte* const kv_;
  LeaseRecord* const record_;
  std::atomic<uint64_t> offered_ = 0;
};

struct Counts {
  uint64_t accepted = 0;
  uint64_t rejected = 0;
  uint64_t torn = 0;         // rejected, and the bytes were really wrong
  uint64_t wrong_bytes = 0;  // accepted all the same: the failure
};

// Copies the first half or all of the block, again and again, through the peer's mapping.
Counts ReadAgainAndAgain(const Owner& owner, const MappedRegion& peer, uint64_t record_offset,
                         uint64_t seed, std::chrono::seconds limit) {
  const auto& record = *reinterpret_cast<const LeaseRecord*>(peer.data() + record_offset);
  Random random(seed);
  Counts counts;
  std::vector<std::byte> copy(kBlockBytes);
  const std::byte* const src[] = {peer.data()};
  std::byte* const dst[] = {copy.data()};
  CopyPlan plan;
  plan.places.resize(1);
  plan.segments.resize(1);
  plan.boxes.resize(1);
  plan.boxes[0].run_bytes = kRowBytes;
  const auto deadline = std::chrono::steady_clock::now() + limit;
  while (counts.accepted + counts.rejected < kReads || counts.accepted == 0 ||
         counts.rejected == 0 || counts.torn == 0) {
    if (std::chrono::steady_clock::now() > deadline) break;
    const uint64_t epoch = owner.offered_epoch();
    if (epoch == 0) continue;
    const uint32_t tokens = Pick(random, 1, 2) * kHalfTokens;
    plan.boxes[0].inner = {tokens, kRowBytes, kRowBytes};

    const GuardWords before = record.ReadBefore();
    ExecuteCopy(plan, src, dst);
    const GuardWords after = record.ReadAfter();
    const bool holds = GuardHolds({epoch, kIncarnation, TableHash(epoch), {tokens}}, before, after);

    bool right = true;
    for (uint64_t i = 0; i < tokens * kRowBytes / sizeof(uint64_t); ++i) {
      uint64_t word = 0;
      std::memcpy(&word, copy.data() + i * sizeof(word), sizeof(word));
      right = right && word == Word(epoch, i);
    }
    ++(holds ? counts.accepted : counts.rejected);
    if (holds && !right) ++counts.wrong_bytes;
    if (!holds && !right) ++counts.torn;
  }
  return counts;
}

TEST(LeaseStress, ReaderNeverAcceptsAByteOfAnotherLease) {
  const uint64_t seed = TestSeed();
  const uint64_t record_offset = 4096;
  const auto region = Region::AllocateHost(8192, "lease_stress");
  ASSERT_TRUE(region.has_value()) << region.error().ToString();
  const auto peer = MappedRegion::Map(UniqueFd(::dup(region->export_fd())), 8192);
  ASSERT_TRUE(peer.has_value()) << peer.error().ToString();
  Owner owner(region->data(), new (region->data() + record_offset) LeaseRecord);

  std::atomic<bool> stop = false;
  std::thread owner_thread([&] { owner.Run(stop, seed); });
  const Counts counts =
      ReadAgainAndAgain(owner, *peer, record_offset, seed + 1, std::chrono::seconds(60));
  stop = true;
  owner_thread.join();

  std::cout << counts.accepted << " accepted, " << counts.rejected << " rejected, of them "
            << counts.torn << " with wrong bytes" << std::endl;
  EXPECT_EQ(counts.wrong_bytes, 0U);
  EXPECT_GE(counts.accepted + counts.rejected, kReads);
  EXPECT_GT(counts.accepted, 0U);
  EXPECT_GT(counts.rejected, 0U);
  EXPECT_GT(counts.torn, 0U) << "nothing was there to be rejected";
}

}  // namespace
}  // namespace kvrelay
