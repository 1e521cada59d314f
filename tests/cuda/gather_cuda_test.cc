// The gather kernel against the host executor, byte by byte. Needs a GPU; skipped elsewhere.
#include "kvcache/cuda/gather_cuda.h"

#include <gtest/gtest.h>

#include <cmath>
#include <cstring>
#include <numeric>
#include <random>
#include <string>
#include <vector>

#include "attention/cuda/device_array.h"
#include "kvcache/convert.h"
#include "kvcache/copy_host.h"
#include "kvcache/cuda/divisor.h"
#include "kvcache/plan_pull.h"
#include "kvcache/shard.h"
#include "tests/kvcache/seed.h"

namespace kvrelay::cuda {
namespace {

using attention::cuda::DeviceArray;
using testing_support::Pick;
using testing_support::Random;
using testing_support::TestSeed;

constexpr std::byte kUntouched{0xa5};

// Two source and two destination regions on the host and the device.
class Memories {
 public:
  Memories(uint64_t bytes, Random& random)
      : bytes_(bytes),
        src_(2 * bytes),
        dst_(2 * bytes),
        device_src_(2 * bytes),
        device_dst_(2 * bytes),
        tables_(1 << 20) {
    for (uint64_t i = 0; i + 8 <= src_.size(); i += 8) {
      const uint64_t bits = random();
      std::memcpy(src_.data() + i, &bits, 8);
    }
    device_src_.Upload(src_);
    KVRELAY_CUDA(cudaStreamCreateWithFlags(&stream_, cudaStreamNonBlocking));
  }
  ~Memories() { cudaStreamDestroy(stream_); }
  Memories(const Memories&) = delete;
  Memories& operator=(const Memories&) = delete;

  // Carries the plan out on both, in regions of `bytes` that begin `shift` bytes late. Empty when
  // all of the destination is the same, or what is wrong.
  std::string Check(const CopyPlan& plan, uint64_t shift, uint64_t bytes, uint32_t max_sms) {
    const std::vector<uint64_t> sizes = {bytes, bytes};
    if (const Status valid = plan.Validate(sizes, sizes); !valid.ok()) return valid.ToString();
    std::fill(dst_.begin(), dst_.begin() + 2 * (bytes + shift), kUntouched);
    const auto at = [&](auto* memory) { return std::vector{memory, memory + bytes + shift}; };
    ExecuteCopy(plan, at(static_cast<const std::byte*>(src_.data()) + shift),
                at(dst_.data() + shift));

    auto gather =
        GatherCuda::Make(plan, at(static_cast<const std::byte*>(device_src_.get()) + shift),
                         at(device_dst_.get() + shift), {max_sms});
    if (!gather) return gather.error().ToString();
    if (gather->table_bytes() > tables_.count()) return "the plan's tables are too large";
    KVRELAY_CUDA(cudaMemsetAsync(device_dst_.get(), 0xa5, 2 * (bytes + shift), stream_));
    if (const Status s = gather->Upload(tables_.get(), stream_); !s.ok()) return s.ToString();
    if (const Status s = gather->Launch(stream_); !s.ok()) return s.ToString();
    got_.resize(2 * (bytes + shift));
    KVRELAY_CUDA(cudaMemcpyAsync(got_.data(), device_dst_.get(), got_.size(),
                                 cudaMemcpyDeviceToHost, stream_));
    KVRELAY_CUDA(cudaStreamSynchronize(stream_));
    return Compare(plan, bytes, shift);
  }

  uint64_t bytes() const { return bytes_; }
  cudaStream_t stream() const { return stream_; }

 private:
  // Of a NaN: any.
  std::string Compare(const CopyPlan& plan, uint64_t bytes, uint64_t shift) const {
    if (std::memcmp(got_.data(), dst_.data(), got_.size()) == 0) return "";
    std::vector<bool> allowed(got_.size());
    ForEachRun(plan, [&](const CopyBox& box, const PlanRun& run) {
      const uint32_t size = box.casts ? SizeOf(box.cast.to) : 0;
      for (uint64_t n = 0; box.casts && n < box.run_bytes; n += size) {
        const uint64_t at = run.dst_region * (bytes + shift) + shift + run.dst + n;
        const auto is_nan = [&](const std::vector<std::byte>& memory) {
          float value = 0;
          std::byte bits[sizeof(value)];
          ConvertRun(box.cast.to, memory.data() + at, DType::kFp32, bits, 1, 1.0F);
          std::memcpy(&value, bits, sizeof(value));
          return std::isnan(value);
        };
        if (!is_nan(got_) || !is_nan(dst_)) continue;
        for (uint64_t i = 0; i < size; ++i) allowed[at + i] = true;
      }
    });
    for (uint64_t i = 0; i < got_.size(); ++i) {
      if (got_[i] == dst_[i] || allowed[i]) continue;
      return "byte " + std::to_string(i) + " of " + std::to_string(got_.size()) + " is " +
             std::to_string(std::to_integer<int>(got_[i])) + ", the host's is " +
             std::to_string(std::to_integer<int>(dst_[i]));
    }
    return "";
  }

  uint64_t bytes_;
  std::vector<std::byte> src_, dst_, got_;
  DeviceArray<std::byte> device_src_, device_dst_, tables_;
  cudaStream_t stream_ = nullptr;
};

struct Side {
  KvLayout layout;
  KvShard shard;
  std::vector<BlockId> blocks;
};

Side MakeSide(Random& random, KvFormat format, DType dtype, const KvShard& shard, uint32_t head_dim,
              uint32_t block_size, uint32_t tokens) {
  const uint32_t needed = (tokens + block_size - 1) / block_size;
  Side side;
  side.shard = shard;
  side.layout = KvLayout::Dense(format, dtype, shard.layer_count, shard.head_count, head_dim,
                                block_size, needed + Pick(random, 0, 3));
  for (std::vector<TensorPlace>* places : {&side.layout.k, &side.layout.v}) {
    for (TensorPlace& place : *places) place.region = Pick(random, 0, 1);
  }
  side.blocks.resize(side.layout.num_blocks);
  std::iota(side.blocks.begin(), side.blocks.end(), 0);
  std::shuffle(side.blocks.begin(), side.blocks.end(), random);
  side.blocks.resize(needed);
  return side;
}

// A pull between two ranks that fit each other.
struct PullCase {
  CopyPlan plan;
  uint64_t region_bytes = 0;
  std::string text;
};

PullCase RandomPull(Random& random) {
  constexpr uint32_t kDims[] = {1, 3, 5, 8, 10, 16, 24, 32, 40, 64, 80, 128};
  const bool mla = Pick(random, 0, 9) == 0;
  const auto format = [&] {
    return mla ? KvFormat::kMla : Pick(random, 0, 1) == 0 ? KvFormat::kNhd : KvFormat::kHnd;
  };
  const auto dtype = [&] { return static_cast<DType>(Pick(random, 0, 5)); };
  const uint32_t layers = Pick(random, 1, 3);
  const uint32_t heads = mla ? 1 : Pick(random, 1, 8);
  const uint32_t head_dim = kDims[Pick(random, 0, std::size(kDims) - 1)];
  const uint32_t end = Pick(random, 1, 70);
  const uint32_t begin = Pick(random, 0, end - 1);
  const auto shard = [&] {
    const uint32_t ranks = Pick(random, 1, heads);
    return KvShard::Make(layers, heads, ranks, Pick(random, 0, ranks - 1)).value();
  };
  KvShard owner_shard = shard();
  const KvShard reader_shard = shard();
  if (owner_shard.head_end() <= reader_shard.head_begin ||
      reader_shard.head_end() <= owner_shard.head_begin) {
    owner_shard = KvShard::Make(layers, heads, 1, 0).value();
  }
  const DType from = dtype();
  const DType to = Pick(random, 0, 2) == 0 ? dtype() : from;
  Side owner = MakeSide(random, format(), from, owner_shard, head_dim, Pick(random, 1, 33), end);
  const Side reader =
      MakeSide(random, format(), to, reader_shard, head_dim,
               Pick(random, 0, 1) == 0 ? owner.layout.block_size : Pick(random, 1, 33), end);
  if (Pick(random, 0, 3) == 0) {
    owner.layout.scales.per_head = true;
    for (std::vector<float>* scales : {&owner.layout.scales.k, &owner.layout.scales.v}) {
      if (mla && scales == &owner.layout.scales.v) continue;
      for (uint32_t i = 0; i < layers * owner_shard.head_count; ++i) {
        scales->push_back(static_cast<float>(Pick(random, 1, 1000)) / 300);
      }
    }
  }
  PullCase pull;
  pull.text = owner.layout.ToString() + " to " + reader.layout.ToString() + ", tokens " +
              std::to_string(begin) + " to " + std::to_string(end);
  auto plan = PlanPull({owner.layout, owner.shard, {owner.blocks}},
                       {reader.layout, reader.shard, {reader.blocks}},
                       std::max(owner.shard.head_begin, reader.shard.head_begin),
                       std::min(owner.shard.head_end(), reader.shard.head_end()), {begin, end});
  EXPECT_TRUE(plan.has_value()) << pull.text << ": " << plan.error().ToString();
  if (plan) pull.plan = *std::move(plan);
  pull.region_bytes = std::max(owner.layout.dense_bytes(), reader.layout.dense_bytes());
  return pull;
}

class GatherCudaTest : public testing::Test {
 protected:
  void SetUp() override {
    int devices = 0;
    const cudaError_t error = cudaGetDeviceCount(&devices);
    if (error != cudaSuccess || devices == 0) {
      GTEST_SKIP() << "no CUDA device: " << cudaGetErrorString(error);
    }
  }
};

TEST_F(GatherCudaTest, PullsEqualTheHostExecutors) {
  constexpr int kCases = 20'000;
  const uint64_t seed = TestSeed();
  Random content(seed);
  Memories memories(8 << 20, content);
  uint64_t bytes = 0;
  uint64_t casting = 0;
  for (int i = 0; i < kCases; ++i) {
    Random random(seed + i);
    const PullCase pull = RandomPull(random);
    // Mostly as allocated, sometimes so that units get small.
    const uint64_t shift = Pick(random, 0, 4) == 0 ? Pick(random, 0, 16) : 0;
    ASSERT_LE(2 * (pull.region_bytes + shift), 2 * memories.bytes()) << pull.text;
    ASSERT_EQ(memories.Check(pull.plan, shift, pull.region_bytes, Pick(random, 1, 32)), "")
        << "case " << i << ": " << pull.text << ", shifted by " << shift;
    bytes += pull.plan.bytes();
    for (const CopyBox& box : pull.plan.boxes) casting += box.casts ? 1 : 0;
  }
  std::cout << kCases << " pulls, " << bytes << " bytes, " << casting << " boxes that cast\n";
}

// Many boxes of any shape: several launches, chunks of several boxes in a CTA.
TEST_F(GatherCudaTest, BoxesOfAnyStridesEqualTheHostExecutors) {
  const uint64_t seed = TestSeed();
  Random random(seed);
  Memories memories(16 << 20, random);
  for (int i = 0; i < 300; ++i) {
    CopyPlan plan;
    uint64_t begin = 0;
    const uint32_t align = 1U << Pick(random, 0, 4);
    for (uint32_t boxes = Pick(random, 1, 50); boxes > 0; --boxes) {
      CopyBox box;
      box.first_place = static_cast<uint32_t>(plan.places.size());
      box.first_segment = static_cast<uint32_t>(plan.segments.size());
      box.num_places = Pick(random, 1, 3);
      box.num_segments = Pick(random, 1, 5);
      box.run_bytes = uint64_t{Pick(random, 1, 100)} * align;
      const uint64_t inner = box.run_bytes + uint64_t{Pick(random, 0, 3)} * align;
      box.inner = {Pick(random, 1, 9), inner + uint64_t{Pick(random, 0, 9)} * align, inner};
      const uint64_t outer = inner * box.inner.count + uint64_t{Pick(random, 0, 3)} * align;
      box.outer = {Pick(random, 1, 9), uint64_t{Pick(random, 0, 999)} * align, outer};
      for (uint32_t s = 0; s < box.num_segments; ++s) {
        plan.segments.push_back(
            {uint64_t{Pick(random, 0, 9999)} * align, s * outer * box.outer.count});
      }
      for (uint32_t p = 0; p < box.num_places; ++p) {
        plan.places.push_back({Pick(random, 0, 1), Pick(random, 0, 1),
                               uint64_t{Pick(random, 0, 9999)} * align, begin});
        begin += outer * box.outer.count * box.num_segments;
      }
      if (begin > memories.bytes()) {  // the last one does not fit
        plan.places.resize(box.first_place);
        break;
      }
      plan.boxes.push_back(box);
    }
    if (plan.boxes.empty()) continue;
    ASSERT_EQ(memories.Check(plan, 0, memories.bytes(), Pick(random, 1, 16)), "") << "case " << i;
  }
}

// Enough units that every CTA takes many full chunks.
TEST_F(GatherCudaTest, ALargePullEqualsTheHostExecutors) {
  Random random(TestSeed());
  Memories memories(uint64_t{128} << 20, random);
  const KvShard owner_shard = KvShard::Make(4, 8, 1, 0).value();
  const KvShard reader_shard = KvShard::Make(4, 8, 4, 2).value();
  for (const DType to : {DType::kBf16, DType::kFp8E4m3}) {
    const Side owner = MakeSide(random, KvFormat::kNhd, DType::kBf16, owner_shard, 128, 16, 7000);
    const Side reader = MakeSide(random, KvFormat::kHnd, to, reader_shard, 128, 24, 7000);
    const auto plan = PlanPull({owner.layout, owner.shard, {owner.blocks}},
                               {reader.layout, reader.shard, {reader.blocks}},
                               reader.shard.head_begin, reader.shard.head_end(), {3, 6999});
    ASSERT_TRUE(plan.has_value()) << plan.error().ToString();
    EXPECT_EQ(memories.Check(*plan, 0, memories.bytes(), 16), "");
  }
}

TEST_F(GatherCudaTest, AGraphCapturesALaunch) {
  CopyPlan plan;
  plan.boxes.resize(1);
  plan.places.resize(1);
  plan.segments.resize(1);
  plan.boxes[0].run_bytes = 4096;
  const DeviceArray<std::byte> src(std::vector<std::byte>(4096, std::byte{7}));
  DeviceArray<std::byte> dst(4096);
  const DeviceArray<std::byte> tables(256);
  const std::byte* const from[] = {src.get()};
  std::byte* const to[] = {dst.get()};
  auto gather = GatherCuda::Make(plan, from, to);
  ASSERT_TRUE(gather.has_value()) << gather.error().ToString();
  cudaStream_t stream = nullptr;
  KVRELAY_CUDA(cudaStreamCreate(&stream));
  ASSERT_TRUE(gather->Upload(tables.get(), stream).ok());
  cudaGraph_t graph = nullptr;
  cudaGraphExec_t replay = nullptr;
  KVRELAY_CUDA(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal));
  ASSERT_TRUE(gather->Launch(stream).ok());
  KVRELAY_CUDA(cudaStreamEndCapture(stream, &graph));
  KVRELAY_CUDA(cudaGraphInstantiate(&replay, graph, 0));
  for (int i = 0; i < 2; ++i) {
    dst.Poison();
    KVRELAY_CUDA(cudaDeviceSynchronize());
    KVRELAY_CUDA(cudaGraphLaunch(replay, stream));
    KVRELAY_CUDA(cudaStreamSynchronize(stream));
    EXPECT_EQ(dst.Download(), src.Download());
  }
  KVRELAY_CUDA(cudaGraphExecDestroy(replay));
  KVRELAY_CUDA(cudaGraphDestroy(graph));
  KVRELAY_CUDA(cudaStreamDestroy(stream));
}

// Needs no device.
TEST(GatherCudaPlan, DivisorsDivide) {
  Random random(TestSeed());
  for (int i = 0; i < 1'000'000; ++i) {
    const auto by = static_cast<uint32_t>((random() >> 33 >> Pick(random, 0, 30)) | 1);
    const Divisor divisor(i < 100'000 ? i / 100 + 1 : by);
    for (const uint64_t around : {random() >> 33, random() >> 33 >> Pick(random, 0, 30)}) {
      const uint64_t multiple = around / divisor.divisor * divisor.divisor;
      for (const uint64_t n : {around, multiple, multiple + divisor.divisor - 1}) {
        if (n > 0x7fffffff) continue;
        ASSERT_EQ(2 * n * divisor.multiplier >> 32 >> divisor.shift, n / divisor.divisor)
            << n << " / " << divisor.divisor;
      }
    }
  }
}

TEST(GatherCudaPlan, ASegmentOfTooManyUnitsIsRefused) {
  CopyPlan plan;
  plan.boxes.resize(1);
  plan.places.resize(1);
  plan.segments.resize(1);
  plan.boxes[0].run_bytes = (uint64_t{1} << 31) + 1;
  const std::byte* const from[] = {nullptr};
  std::byte* const to[] = {nullptr};
  const auto gather = GatherCuda::Make(plan, from, to);
  ASSERT_FALSE(gather.has_value());
  EXPECT_EQ(gather.error().code(), Code::kTooLarge);
  plan.boxes[0].run_bytes = uint64_t{1} << 31;  // units of 16 bytes
  EXPECT_TRUE(GatherCuda::Make(plan, from, to).has_value());
}

}  // namespace
}  // namespace kvrelay::cuda
