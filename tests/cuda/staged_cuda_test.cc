// KV of a GPU to the host, of the host to a GPU, and from GPU to GPU through pinned memory, over
// every transport that does it. Needs a GPU; skipped elsewhere.
#include <gtest/gtest.h>

#include <algorithm>
#include <chrono>
#include <functional>
#include <future>
#include <memory>
#include <numeric>
#include <string>
#include <vector>

#include "kvcache/cuda/device_cuda.h"
#include "tests/common/temp_dir.h"
#include "tests/cuda/gpu_end.h"
#include "tests/kvcache/seed.h"

namespace kvrelay::cuda {
namespace {

using std::chrono::steady_clock;
using transport::Completion;
using transport::StreamPlan;

constexpr uint64_t kStagedHash = 0x7654321;
constexpr uint64_t kSlice = 208;  // no power of two
constexpr uint64_t kRows = 64;    // of a block
constexpr uint64_t kBlock = kSlice * kRows;
constexpr uint32_t kBlocks = 300;
constexpr uint32_t kBlocksOfAChunk = 7;
constexpr uint32_t kChunks = (kBlocks + kBlocksOfAChunk - 1) / kBlocksOfAChunk;
constexpr uint64_t kOwnerBytes = kBlock * kBlocks * 2;  // every second slice is read
constexpr uint64_t kReaderBytes = kBlock * kBlocks;

// Blocks [first, first + count) in an order of the seed's, from the owner's strides to the
// reader's.
struct Strides {
  uint64_t row = 0;
  std::function<uint64_t(uint32_t block)> at;
};
CopyPlan BlocksFrom(const Strides& src, const Strides& dst, uint32_t first, uint32_t count) {
  CopyPlan plan;
  plan.boxes.resize(1);
  plan.boxes[0].run_bytes = kSlice;
  plan.boxes[0].inner = {kRows, src.row, dst.row};
  plan.boxes[0].num_places = 1;
  plan.boxes[0].num_segments = count;
  plan.places = {{0, 0, 0, 0}};
  for (uint32_t i = 0; i < count; ++i) {
    plan.segments.push_back({.src = src.at(first + i), .dst = dst.at(first + i)});
  }
  return plan;
}

struct StagedWay {
  std::string name;
  std::string transport;
  bool owner_gpu;
  bool reader_gpu;
};

class StagedCudaTest : public testing::TestWithParam<StagedWay> {
 protected:
  void SetUp() override {
    const auto opened = OpenDevice(0);
    if (!opened.has_value()) GTEST_SKIP() << opened.error().message();
  }
};

TEST_P(StagedCudaTest, EveryByteComesAndNoOther) {
  const StagedWay& way = GetParam();
  const tests::TempDir folder;
  const auto device = [](bool gpu) { return gpu ? OpenDevice(0).value() : nullptr; };
  const GpuEnd owner(device(way.owner_gpu), kOwnerBytes, folder.path(), 21, way.transport);
  const GpuEnd reader(device(way.reader_gpu), kReaderBytes, folder.path(), 22, way.transport);
  testing_support::Random random(testing_support::TestSeed());
  std::vector<std::byte> pattern(kOwnerBytes);
  for (std::byte& byte : pattern) byte = static_cast<std::byte>(random() >> 7);
  owner.Set(pattern);
  std::vector<uint32_t> from(kBlocks);
  std::iota(from.begin(), from.end(), 0);
  std::vector<uint32_t> to = from;
  std::ranges::shuffle(from, random);
  std::ranges::shuffle(to, random);
  const Strides owners{2 * kSlice, [&](uint32_t block) { return from[block] * 2 * kBlock; }};
  const Strides readers{kSlice, [&](uint32_t block) { return to[block] * kBlock; }};
  const GuardExpectation want{
      .epoch = 5, .incarnation = 21, .table_hash = kStagedHash, .extent = {.tokens = 1}};
  owner.record().Start(5, 21, kStagedHash);
  owner.record().Publish({.tokens = 1, .chunk_end = 1, .layers = 0});
  const auto peer = reader.Connect(owner.Spec());
  ASSERT_TRUE(peer.has_value()) << peer.error().ToString();

  for (transport::StreamId stream = 1; stream <= 5; ++stream) {
    reader.Set(std::vector<std::byte>(kReaderBytes, std::byte{0x5a}));
    std::promise<Completion> done;
    const auto received = [&](Completion completion) { done.set_value(std::move(completion)); };
    const TimePoint deadline = steady_clock::now() + std::chrono::seconds(20);
    if (reader.way->style() == transport::Style::kOneSided) {
      reader.way->Read(*peer, transport::Whole(BlocksFrom(owners, readers, 0, kBlocks)),
                       {.region = GpuEnd::kRecords}, deadline, received);
    } else {
      const Strides chunk{kSlice, [](uint32_t block) { return block % kBlocksOfAChunk * kBlock; }};
      const auto plan_of = [](const Strides& src, const Strides& dst) {
        return StreamPlan{kChunks, kBlocksOfAChunk * kBlock, [src, dst](uint32_t index) {
                            const uint32_t first = index * kBlocksOfAChunk;
                            return Result<CopyPlan>(BlocksFrom(
                                src, dst, first, std::min(kBlocksOfAChunk, kBlocks - first)));
                          }};
      };
      reader.way->StartPackedReceive(*peer, stream, plan_of(chunk, readers), want, deadline,
                                     received);
      owner.way->StartPackedSend(reader.Spec(), stream, plan_of(owners, chunk), &owner.record(),
                                 want, deadline, [](const Completion&) {});
    }
    auto future = done.get_future();
    ASSERT_EQ(future.wait_for(std::chrono::seconds(30)), std::future_status::ready);
    const Completion completion = future.get();
    ASSERT_TRUE(completion.status.ok()) << completion.status.ToString();
    EXPECT_EQ(completion.bytes, kReaderBytes);
    EXPECT_TRUE(GuardHolds(want, completion.before, completion.after));
    const std::vector<std::byte> got = reader.Get();
    for (uint32_t block = 0; block < kBlocks; ++block) {
      for (uint64_t row = 0; row < kRows; ++row) {
        const std::byte* const is = &got[readers.at(block) + row * kSlice];
        const std::byte* const was = &pattern[owners.at(block) + row * 2 * kSlice];
        ASSERT_TRUE(std::equal(is, is + kSlice, was)) << "block " << block << " row " << row;
      }
    }
  }
}

INSTANTIATE_TEST_SUITE_P(
    Ways, StagedCudaTest,
    testing::Values(StagedWay{"UcxPackedFromGpuToHost", "ucx-packed", true, false},
                    StagedWay{"UcxPackedFromHostToGpu", "ucx-packed", false, true},
                    StagedWay{"UcxPackedFromGpuToGpu", "ucx-packed", true, true},
                    StagedWay{"ZmqPackedFromGpuToHost", "zmq-packed", true, false},
                    StagedWay{"ZmqPackedFromHostToGpu", "zmq-packed", false, true},
                    StagedWay{"MappedFromHostToGpu", "mapped", false, true},
                    StagedWay{"MappedFromGpuToGpu", "mapped", true, true}),
    [](const auto& way) { return way.param.name; });

TEST(StagedCuda, GpuMemoryIsNotTheHostsToMap) {
  const auto opened = OpenDevice(0);
  if (!opened.has_value()) GTEST_SKIP() << opened.error().message();
  const tests::TempDir folder;
  const GpuEnd owner(*opened, 1 << 20, folder.path(), 21);
  const GpuEnd reader(nullptr, 1 << 20, folder.path(), 22);
  const auto peer = reader.Connect(owner.Spec());
  ASSERT_FALSE(peer.has_value());
  EXPECT_EQ(peer.error().ToString(),
            "kIncompatible: region 0: it is a GPU's memory, ours is the host's");
}

}  // namespace
}  // namespace kvrelay::cuda
