// Paged attention's kernels against the fp64 oracle. Needs a GPU of compute capability 8.0 or more;
// skipped elsewhere.
#include "attention/cuda/paged_cuda.h"

#include <gtest/gtest.h>

#include <string>
#include <vector>

#include "tests/cuda/paged_cuda_case.h"
#include "tests/cuda/relay_case.h"

namespace kvrelay::attention::cuda {
namespace {

class PagedCudaTest : public testing::Test {
 protected:
  void SetUp() override {
    if (const Status usable = PagedDeviceUsable(); !usable.ok()) GTEST_SKIP() << usable.message();
  }
};

void ExpectRight(const PagedCudaShape& shape) {
  PagedCudaCase test(shape, Seed());
  test.ExpectRight(test.Run());
}

constexpr DType kQueryTypes[] = {DType::kFp32, DType::kFp16, DType::kBf16};
constexpr DType kCacheTypes[] = {DType::kFp32,    DType::kFp16,    DType::kBf16,
                                 DType::kFp8E4m3, DType::kFp8E5m2, DType::kInt8};

TEST_F(PagedCudaTest, DecodeAtEdgeLengths) {
  for (const DType dtype : {DType::kBf16, DType::kFp32}) {
    PagedCudaShape shape;
    shape.kernels.dtype = dtype;
    shape.kernels.cache_dtype = dtype;
    for (const uint32_t context : {0,  1,   2,   7,   15,  16,  17,  31,  32,  33,   63,  64,
                                   65, 127, 128, 129, 255, 256, 257, 511, 513, 1025, 5000}) {
      shape.sequences.push_back({1, context});
    }
    ExpectRight(shape);
  }
}

TEST_F(PagedCudaTest, ChunksOfPromptsAndDecodeRowsTogether) {
  for (const DType dtype : {DType::kBf16, DType::kFp32}) {
    PagedCudaShape shape;
    shape.kernels.dtype = dtype;
    shape.kernels.cache_dtype = dtype;
    shape.prefixes = {48, 400};
    shape.sequences = {{1, 100},   {5, 5},        {0, 0},     {64, 64},     {33, 300},
                       {1, 0},     {17, 80, 0},   {1, 48, 0}, {2, 430, 1},  {1, 900, 1},
                       {200, 200}, {130, 700, 1}, {3, 20, 0}, {16, 416, 1}, {4, 3}};
    ExpectRight(shape);
  }
}

TEST_F(PagedCudaTest, TypesOfQueriesAndCaches) {
  for (const DType dtype : kQueryTypes) {
    for (const DType cache_dtype : kCacheTypes) {
      for (const CaseScales scales :
           {CaseScales::kNone, CaseScales::kTensor, CaseScales::kHead, CaseScales::kSequence}) {
        PagedCudaShape shape;
        shape.kernels.dtype = dtype;
        shape.kernels.cache_dtype = cache_dtype;
        shape.scales = scales;
        if (cache_dtype == DType::kInt8) shape.logits = 4.0F / 24;
        shape.sequences = {{1, 300}, {1, 40}, {70, 90}, {3, 700}};
        ExpectRight(shape);
        if (HasFailure()) return;
      }
    }
  }
}

TEST_F(PagedCudaTest, HeadSizesGroupsAndLayouts) {
  struct Heads {
    uint32_t query;
    uint32_t kv;
  };
  const Heads all_heads[] = {{1, 1}, {6, 2}, {5, 1}, {14, 2}, {16, 1}, {9, 1}, {48, 2}};
  uint32_t which = 0;
  for (const uint32_t head_dim : {8, 40, 64, 80, 96, 120, 128, 192, 256, 320, 576}) {
    for (const DType cache_dtype : {DType::kBf16, DType::kFp8E4m3, DType::kFp32}) {
      for (const int layout : {0, 1, 2, 3}) {
        const Heads heads = all_heads[which++ % std::size(all_heads)];
        PagedCudaShape shape;
        shape.kernels.query_heads = heads.query;
        shape.kernels.kv_heads = heads.kv;
        shape.kernels.head_dim = head_dim;
        shape.kernels.cache_dtype = cache_dtype;
        shape.kernels.block_size = std::vector<uint32_t>{16, 1, 7, 64}[which % 4];
        shape.nhd = layout % 2 == 1;
        shape.interleaved = layout / 2 == 1;
        shape.gap_bytes = which % 3 * 16;
        shape.sequences = {{1, 150}, {40, 90}, {2, 33}};
        ExpectRight(shape);
        if (HasFailure()) return;
      }
    }
  }
}

TEST_F(PagedCudaTest, MlaReadsItsLatentOnce) {
  for (const uint32_t query_heads : {1, 16, 32, 128}) {
    for (const DType dtype : kQueryTypes) {
      PagedCudaShape shape;
      shape.kernels.query_heads = query_heads;
      shape.kernels.kv_heads = 1;
      shape.kernels.head_dim = 576;
      shape.kernels.value_dim = 512;
      shape.kernels.dtype = dtype;
      shape.kernels.cache_dtype = dtype;
      shape.mla = true;
      shape.prefixes = {128};
      shape.sequences = {{1, 500, 0}, {1, 1}, {1, 64}, {1, 0}, {1, 2000}, {3, 300, 0}};
      ExpectRight(shape);
      if (HasFailure()) return;
    }
  }
}

TEST_F(PagedCudaTest, WindowsThatHideWholeChunks) {
  for (const uint32_t window : {1, 2, 16, 63, 64, 100, 1000}) {
    PagedCudaShape shape;
    shape.kernels.window = window;
    shape.prefixes = {640};
    shape.sequences = {{1, 2000}, {1, 700, 0}, {100, 1500}, {10, 645, 0}, {1, 1}, {150, 150}};
    ExpectRight(shape);
    if (HasFailure()) return;
  }
}

TEST_F(PagedCudaTest, SoftCapsAndBiases) {
  for (const bool alibi : {false, true}) {
    for (const float soft_cap : {0.0F, 5.0F}) {
      PagedCudaShape shape;
      shape.soft_cap = soft_cap;
      shape.alibi = alibi;
      shape.logits = 12;
      shape.sequences = {{1, 300}, {80, 500}, {1, 2500}};
      ExpectRight(shape);
    }
  }
}

TEST_F(PagedCudaTest, VeryLargeLogits) {
  PagedCudaShape shape;
  shape.logits = 1e4;
  shape.sequences = {{1, 300}, {80, 200}, {1, 1500}};
  ExpectRight(shape);
}

TEST_F(PagedCudaTest, RandomKinds) {
  std::mt19937_64 random(Seed());
  const auto uniform = [&](uint32_t low, uint32_t high) {
    return std::uniform_int_distribution<uint32_t>(low, high)(random);
  };
  for (int round = 0; round < 60; ++round) {
    SCOPED_TRACE("seed " + std::to_string(Seed()) + " round " + std::to_string(round));
    PagedCudaShape shape;
    PagedShape& kernels = shape.kernels;
    kernels.kv_heads = uniform(1, 4);
    kernels.query_heads = kernels.kv_heads * uniform(1, 9);
    kernels.head_dim = std::vector<uint32_t>{64, 128, 80, 96, 192, 256, 40}[uniform(0, 6)];
    kernels.dtype = kQueryTypes[uniform(0, 2)];
    kernels.cache_dtype = uniform(0, 1) == 0 ? kernels.dtype : kCacheTypes[uniform(0, 5)];
    kernels.block_size = std::vector<uint32_t>{16, 16, 32, 5}[uniform(0, 3)];
    if (uniform(0, 3) == 0) kernels.window = uniform(1, 300);
    if (uniform(0, 3) == 0) shape.soft_cap = 10;
    shape.alibi = uniform(0, 3) == 0;
    shape.nhd = uniform(0, 1) == 0;
    shape.interleaved = uniform(0, 1) == 0;
    shape.gap_bytes = uniform(0, 2) * 8;
    shape.scales = static_cast<CaseScales>(uniform(0, 3));
    if (kernels.cache_dtype == DType::kInt8) shape.logits /= 24;
    for (uint32_t p = uniform(0, 2); p > 0; --p) {
      shape.prefixes.push_back(kernels.block_size * uniform(0, 30));
    }
    const bool decode = uniform(0, 1) == 0;
    for (uint32_t s = uniform(1, 30); s > 0; --s) {
      SequenceLengths lengths;
      lengths.rows = decode ? 1 : uniform(0, uniform(0, 1) == 0 ? 3 : 150);
      lengths.context = lengths.rows + uniform(0, uniform(0, 1) == 0 ? 40 : 700);
      if (!shape.prefixes.empty() && uniform(0, 1) == 0) {
        lengths.prefix = uniform(0, static_cast<uint32_t>(shape.prefixes.size()) - 1);
        lengths.context += shape.prefixes[lengths.prefix];
      }
      shape.sequences.push_back(lengths);
    }
    ExpectRight(shape);
    if (HasFailure()) return;
  }
}

TEST_F(PagedCudaTest, EqualBitsEveryTime) {
  PagedCudaShape shape;
  shape.sequences = {{1, 3000}, {1, 5000}, {90, 800}, {1, 100}};
  PagedCudaCase test(shape, Seed());
  const PagedCudaOutput first = test.Run();
  test.ExpectRight(first);
  for (int i = 0; i < 300; ++i) {
    ASSERT_TRUE(test.Run() == first) << "run " << i;
  }
}

TEST_F(PagedCudaTest, AGraphSeesLengthsThatChange) {
  PagedCudaShape shape;
  shape.prefixes = {160};
  for (uint32_t s = 0; s < 9; ++s) {
    shape.sequences.push_back({s % 3 == 0 ? 70U : 1U, 600 + 300 * s, s % 2 == 0 ? 0 : kNoPrefix});
  }
  PagedCudaCase test(shape, Seed());
  cudaStream_t stream = nullptr;
  cudaGraph_t graph = nullptr;
  cudaGraphExec_t replay = nullptr;
  KVRELAY_CUDA(cudaStreamCreate(&stream));
  KVRELAY_CUDA(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal));
  test.Launch(stream);
  KVRELAY_CUDA(cudaStreamEndCapture(stream, &graph));
  KVRELAY_CUDA(cudaGraphInstantiate(&replay, graph, 0));
  std::mt19937_64 random(Seed());
  for (int step = 0; step < 20; ++step) {
    SCOPED_TRACE("seed " + std::to_string(Seed()) + " step " + std::to_string(step));
    std::vector<SequenceLengths> now = shape.sequences;
    for (SequenceLengths& s : now) {
      s.rows = std::uniform_int_distribution<uint32_t>(0, s.rows)(random);
      const uint32_t least = s.prefix == kNoPrefix ? 0 : shape.prefixes[s.prefix];
      s.context = std::uniform_int_distribution<uint32_t>(least, s.context)(random);
    }
    test.SetLengths(now);
    test.Poison();
    KVRELAY_CUDA(cudaGraphLaunch(replay, stream));
    test.ExpectRight(test.Read());
    if (HasFailure()) break;
  }
  KVRELAY_CUDA(cudaGraphExecDestroy(replay));
  KVRELAY_CUDA(cudaGraphDestroy(graph));
  KVRELAY_CUDA(cudaStreamDestroy(stream));
}

TEST_F(PagedCudaTest, WhatCannotBeServedSaysWhy) {
  PagedShape shape{.query_heads = 7, .kv_heads = 2, .max_sequences = 1, .max_rows = 1};
  EXPECT_FALSE(PagedKernels::Create(shape));
  shape.query_heads = 8;
  shape.head_dim = 100;
  const Result<PagedKernels> odd = PagedKernels::Create(shape);
  ASSERT_FALSE(odd);
  EXPECT_NE(odd.error().message().find("multiples of 8"), std::string::npos);
  shape.head_dim = 584;
  EXPECT_FALSE(PagedKernels::Create(shape));
  shape.head_dim = 128;
  shape.dtype = DType::kInt8;
  EXPECT_FALSE(PagedKernels::Create(shape));
}

}  // namespace
}  // namespace kvrelay::attention::cuda
