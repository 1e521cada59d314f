// Relay attention's kernels against the fp64 oracle. Needs a Hopper GPU; skipped elsewhere.
#include "attention/cuda/relay_cuda.h"

#include <gtest/gtest.h>

#include <string>
#include <vector>

#include "tests/cuda/hold_sms.h"
#include "tests/cuda/relay_case.h"

namespace kvrelay::attention::cuda {
namespace {

class RelayCudaTest : public testing::Test {
 protected:
  void SetUp() override {
    if (const Status usable = DeviceUsable(); !usable.ok()) GTEST_SKIP() << usable.message();
  }
};

std::vector<RequestLengths> Repeat(uint32_t count, uint32_t prefix, uint32_t own) {
  return std::vector<RequestLengths>(count, {prefix, own});
}

void ExpectAllModesRight(const CaseShape& shape) {
  RelayCase test(shape, Seed());
  for (const RelayMode mode : {RelayMode::kNever, RelayMode::kAlways, RelayMode::kAuto}) {
    SCOPED_TRACE("mode " + std::to_string(static_cast<int>(mode)));
    test.ExpectRight(test.Run(mode));
    if (testing::Test::HasFailure()) return;
  }
}

TEST_F(RelayCudaTest, PagedAtEdgeLengths) {
  CaseShape shape;
  for (const uint32_t own : {0,   1,   2,   7,   8,   9,   15,  16,  17,  31,  33,   127,
                             128, 129, 143, 255, 256, 257, 300, 511, 513, 640, 1000, 1025}) {
    shape.requests.push_back({kNoPrefix, own});
  }
  ExpectAllModesRight(shape);
}

TEST_F(RelayCudaTest, PrefixAloneAtEdgeLengths) {
  for (const uint32_t prefix : {16, 112, 128, 144, 256, 640, 656, 2048}) {
    CaseShape shape;
    shape.prefixes = {prefix};
    shape.requests = Repeat(3, 0, 0);
    ExpectAllModesRight(shape);
    if (HasFailure()) return;
  }
}

TEST_F(RelayCudaTest, PrefixRowsThatFillTiles) {
  for (const uint32_t sharers : {1, 15, 16, 17, 31, 32, 33, 64, 100}) {
    CaseShape shape;
    shape.prefixes = {400};
    shape.requests = Repeat(sharers, 0, 5);
    ExpectAllModesRight(shape);
    if (HasFailure()) return;
  }
}

TEST_F(RelayCudaTest, GroupSizes) {
  struct Heads {
    uint32_t query;
    uint32_t kv;
  };
  for (const Heads heads : {Heads{1, 1},
                            {4, 4},
                            {4, 2},
                            {6, 2},
                            {4, 1},
                            {5, 1},
                            {14, 2},
                            {8, 1},
                            {9, 1},
                            {12, 1},
                            {16, 1},
                            {32, 1},
                            {48, 2},
                            {71, 1}}) {
    CaseShape shape;
    shape.query_heads = heads.query;
    shape.kv_heads = heads.kv;
    shape.prefixes = {272};
    shape.requests = Repeat(9, 0, 77);
    shape.requests.push_back({kNoPrefix, 300});
    ExpectAllModesRight(shape);
    if (HasFailure()) return;
  }
}

TEST_F(RelayCudaTest, HeadSizesTypesAndLayouts) {
  for (const uint32_t head_dim : {64, 128}) {
    for (const DType dtype : {DType::kBf16, DType::kFp16}) {
      for (const uint32_t block_size : {16, 32, 48, 256}) {
        for (const int layout : {0, 1, 2, 3}) {
          CaseShape shape;
          shape.head_dim = head_dim;
          shape.dtype = dtype;
          shape.block_size = block_size;
          shape.nhd = layout % 2 == 1;
          shape.interleaved = layout / 2 == 1;
          shape.prefixes = {block_size * 3, block_size * (400 / block_size + 1)};
          shape.requests = Repeat(6, 0, 60);
          shape.requests.push_back({1, 129});
          shape.requests.push_back({1, 0});
          shape.requests.push_back({kNoPrefix, 70});
          ExpectAllModesRight(shape);
          if (HasFailure()) return;
        }
      }
    }
  }
}

TEST_F(RelayCudaTest, LargeLogits) {
  CaseShape shape;
  shape.logits = 1e4;
  shape.prefixes = {384};
  shape.requests = Repeat(10, 0, 200);
  ExpectAllModesRight(shape);
}

TEST_F(RelayCudaTest, RandomBatches) {
  std::mt19937_64 random(Seed());
  const auto uniform = [&](uint32_t low, uint32_t high) {
    return std::uniform_int_distribution<uint32_t>(low, high)(random);
  };
  for (int round = 0; round < 25; ++round) {
    SCOPED_TRACE("seed " + std::to_string(Seed()) + " round " + std::to_string(round));
    CaseShape shape;
    shape.kv_heads = 1 << uniform(0, 3);
    shape.query_heads = shape.kv_heads * uniform(1, 8);
    const uint32_t prefixes = uniform(0, 4);
    for (uint32_t p = 0; p < prefixes; ++p) {
      shape.prefixes.push_back(16 * uniform(0, uniform(0, 1) == 0 ? 8 : 150));
    }
    const uint32_t requests = uniform(1, 90);
    for (uint32_t r = 0; r < requests; ++r) {
      const uint32_t prefix = uniform(0, prefixes);
      shape.requests.push_back(
          {prefix == prefixes ? kNoPrefix : prefix, uniform(0, uniform(0, 3) == 0 ? 1500 : 150)});
    }
    ExpectAllModesRight(shape);
    if (HasFailure()) return;
  }
}

CaseShape Mixed() {
  CaseShape shape;
  shape.query_heads = 32;
  shape.kv_heads = 8;
  shape.prefixes = {1024, 48};
  shape.requests = Repeat(40, 0, 130);
  for (uint32_t i = 0; i < 10; ++i) shape.requests.push_back({1, 100 * i});
  for (uint32_t i = 0; i < 10; ++i) shape.requests.push_back({kNoPrefix, 37 * i});
  return shape;
}

TEST_F(RelayCudaTest, SameBitsAThousandTimes) {
  RelayCase test(Mixed(), Seed());
  const CaseOutput first = test.Run(RelayMode::kAlways);
  test.ExpectRight(first);
  for (int i = 0; i < 1000; ++i) {
    ASSERT_TRUE(test.Run(RelayMode::kAlways) == first) << "run " << i;
  }
}

TEST_F(RelayCudaTest, GraphStaysValidWhenLengthsChange) {
  const CaseShape shape = Mixed();
  RelayCase test(shape, Seed());
  cudaStream_t stream = nullptr;
  cudaGraph_t graph = nullptr;
  cudaGraphExec_t replay = nullptr;
  KVRELAY_CUDA(cudaStreamCreate(&stream));
  KVRELAY_CUDA(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal));
  test.Launch(RelayMode::kAuto, stream);
  KVRELAY_CUDA(cudaStreamEndCapture(stream, &graph));
  KVRELAY_CUDA(cudaGraphInstantiate(&replay, graph, 0));
  // Only lengths that leave every token where it was filled: fewer own tokens, fewer sharers.
  std::mt19937_64 random(Seed());
  for (int i = 0; i < 1000; ++i) {
    std::vector<RequestLengths> requests = shape.requests;
    std::vector<uint32_t> prefixes = shape.prefixes;
    const uint32_t sharers = random() % 3 == 0 ? 0 : random() % 61;
    for (size_t r = 0; r < requests.size(); ++r) {
      if (r >= sharers && requests[r].prefix != kNoPrefix) requests[r].prefix = kNoPrefix;
      requests[r].own = random() % (requests[r].own + 1);
    }
    prefixes[0] = 16 * (random() % 65);
    test.SetLengths(requests, prefixes);
    test.Poison();
    KVRELAY_CUDA(cudaGraphLaunch(replay, stream));
    const CaseOutput got = test.Read();
    if (i % 50 == 0) {
      SCOPED_TRACE("replay " + std::to_string(i) + ", seed " + std::to_string(Seed()));
      test.ExpectRight(got);
      if (HasFailure()) break;
    }
  }
  KVRELAY_CUDA(cudaGraphExecDestroy(replay));
  KVRELAY_CUDA(cudaGraphDestroy(graph));
  KVRELAY_CUDA(cudaStreamDestroy(stream));
}

TEST_F(RelayCudaTest, SameBitsBesideAKernelThatHoldsMultiprocessors) {
  RelayCase test(Mixed(), Seed());
  const CaseOutput alone = test.Run(RelayMode::kAlways);
  cudaStream_t stream = nullptr;
  KVRELAY_CUDA(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking));
  for (const uint32_t held : {16, 131}) {
    test.Poison();
    KVRELAY_CUDA(cudaDeviceSynchronize());
    const HeldSms hold(held);
    test.Launch(RelayMode::kAlways, stream);
    KVRELAY_CUDA(cudaStreamSynchronize(stream));  // while they are held
    hold.Release();
    EXPECT_TRUE(test.Read() == alone) << held << " held";
  }
  KVRELAY_CUDA(cudaStreamDestroy(stream));
}

}  // namespace
}  // namespace kvrelay::attention::cuda
