// Each kernel against the host's function of the same name, or a plain loop. Needs a GPU; skipped
// elsewhere.
#include <cuda_runtime_api.h>
#include <gtest/gtest.h>

#include <cmath>
#include <cstring>
#include <random>

#include "engine/cuda/blas.h"
#include "engine/cuda/kernels.h"
#include "engine/kv_write.h"
#include "engine/rope.h"
#include "engine/sampler.h"
#include "kvcache/convert.h"
#include "tests/engine/engine_testing.h"

namespace kvrelay::engine::cuda {
namespace {

// Device memory with what a host has.
template <typename T>
DeviceBuffer<T> Upload(const std::vector<T>& host) {
  auto out = AllocateDevice<T>(host.size(), "test");
  EXPECT_TRUE(out) << out.error().ToString();
  cudaMemcpy(out->get(), host.data(), host.size() * sizeof(T), cudaMemcpyHostToDevice);
  return *std::move(out);
}

template <typename T>
std::vector<T> Download(const T* device, size_t count) {
  std::vector<T> host(count);
  EXPECT_EQ(cudaMemcpy(host.data(), device, count * sizeof(T), cudaMemcpyDeviceToHost),
            cudaSuccess);
  return host;
}

float Load(DType dtype, const std::byte* at) {
  return WithNumber(dtype, [at]<typename Number>(Number) {
    typename Number::Bits bits = 0;
    std::memcpy(&bits, at, sizeof(bits));
    return Number::ToFloat(bits);
  });
}

// What is left of `value` in the type.
float Rounded(DType dtype, float value) {
  return WithNumber(dtype, [value]<typename Number>(Number) {
    return Number::ToFloat(Number::FromFloat(value));
  });
}

// A step of the type, relative, and a bit for fp32's sums.
float Tolerance(DType dtype) {
  return dtype == DType::kFp32 ? 2e-6F : dtype == DType::kFp16 ? 1.5e-3F : 1.2e-2F;
}

class KernelsCudaTest : public testing::TestWithParam<DType> {
 protected:
  void SetUp() override {
    int count = 0;
    const cudaError_t error = cudaGetDeviceCount(&count);
    if (error != cudaSuccess) GTEST_SKIP() << "no CUDA device: " << cudaGetErrorString(error);
  }

  std::vector<float> Numbers(size_t count, float deviation = 1) {
    std::normal_distribution<float> normal(0, deviation);
    std::vector<float> numbers(count);
    for (float& x : numbers) x = normal(random_);
    return numbers;
  }
  // Numbers that the type holds exactly.
  std::vector<float> Exact(size_t count, float deviation = 1) {
    std::vector<float> numbers = Numbers(count, deviation);
    for (float& x : numbers) x = Rounded(GetParam(), x);
    return numbers;
  }
  DeviceBuffer<std::byte> Typed(const std::vector<float>& numbers) const {
    const DeviceBuffer<float> wide = Upload(numbers);
    auto out = AllocateDevice<std::byte>(numbers.size() * SizeOf(GetParam()), "test");
    EXPECT_TRUE(Narrow(GetParam(), wide.get(), numbers.size(), out->get(), nullptr).ok());
    cudaDeviceSynchronize();
    return *std::move(out);
  }
  DeviceBuffer<std::byte> Room(size_t count) const {
    auto out = AllocateDevice<std::byte>(count * SizeOf(GetParam()), "test");
    cudaMemset(out->get(), 0xff, count * SizeOf(GetParam()));
    return *std::move(out);
  }
  std::vector<float> Wide(const DeviceBuffer<std::byte>& device, size_t count) const {
    const auto bytes = Download(device.get(), count * SizeOf(GetParam()));
    std::vector<float> out(count);
    for (size_t i = 0; i < count; ++i) {
      out[i] = Load(GetParam(), bytes.data() + i * SizeOf(GetParam()));
    }
    return out;
  }
  static void ExpectClose(const std::vector<float>& got, const std::vector<float>& want,
                          float tolerance, float scale = 1) {
    ASSERT_EQ(got.size(), want.size());
    for (size_t i = 0; i < got.size(); ++i) {
      const float bound = tolerance * std::max(scale, std::fabs(want[i]));
      ASSERT_LE(std::fabs(got[i] - want[i]), bound) << i << ": " << got[i] << " " << want[i];
    }
  }

  std::mt19937_64 random_{TestSeed()};
};

TEST_P(KernelsCudaTest, RowsOfTheEmbedding) {
  const uint32_t hidden = 40;
  const std::vector<float> embedding = Exact(50 * hidden);
  const std::vector<uint32_t> tokens = {7, 0, 49, 7};
  const auto device = Typed(embedding);
  const auto ids = Upload(tokens);
  const auto x = Upload(std::vector<float>(tokens.size() * hidden, NAN));
  ASSERT_TRUE(Embed(GetParam(), device.get(), ids.get(), 4, hidden, x.get(), nullptr).ok());
  const auto got = Download(x.get(), tokens.size() * hidden);
  for (size_t i = 0; i < got.size(); ++i) {
    ASSERT_EQ(got[i], embedding[tokens[i / hidden] * hidden + i % hidden]);
  }
}

TEST_P(KernelsCudaTest, NormOfChosenRows) {
  for (const uint32_t hidden : {24U, 256U, 4096U}) {
    const std::vector<float> x = Numbers(size_t{3} * hidden, 3);
    const std::vector<float> weight = Numbers(hidden);
    const auto device = Upload(x);
    const auto weights = Upload(weight);
    const auto rows_of = Upload(std::vector<uint32_t>{2, 0});
    const auto out = Room(size_t{2} * hidden);
    ASSERT_TRUE(RmsNorm(GetParam(), device.get(), rows_of.get(), weights.get(), 1e-5F, 2, hidden,
                        out.get(), nullptr)
                    .ok());
    std::vector<float> want;
    for (const size_t row : {2U, 0U}) {
      double squares = 0;
      for (size_t i = 0; i < hidden; ++i)
        squares += double{x[row * hidden + i]} * x[row * hidden + i];
      const double scale = 1 / std::sqrt(squares / hidden + 1e-5);
      for (size_t i = 0; i < hidden; ++i) {
        want.push_back(static_cast<float>(weight[i] * x[row * hidden + i] * scale));
      }
    }
    ExpectClose(Wide(out, want.size()), want, Tolerance(GetParam()));
  }
}

// Biases, norms of heads, rotation, and the rows that the host would write, in every type of cache
// and either order inside a block; a row without a block writes nothing.
TEST_P(KernelsCudaTest, QkvIsSplitTurnedAndStored) {
  constexpr uint32_t kRows = 5;
  constexpr uint32_t kQ = 6;
  constexpr uint32_t kKv = 2;
  const std::vector<uint32_t> positions = {0, 3, 17, 4000, 9};
  const std::vector<BlockId> blocks = {4, 0, 2, 3, kNoBlock};
  for (const uint32_t dim : {8U, 64U, 128U}) {
    for (const DType cache : {DType::kFp32, DType::kFp16, DType::kBf16}) {
      for (const bool extras : {false, true}) {
        const KvLayout layout =
            KvLayout::Dense(extras ? KvFormat::kHnd : KvFormat::kNhd, cache, 2, kKv, dim, 4, 5);
        std::vector<std::byte> want_cache(layout.dense_bytes(), std::byte{0x11});
        const auto device_cache = Upload(want_cache);
        const KvView host(layout, {want_cache.data()});
        const KvView device(layout, {device_cache.get()});
        const size_t width = size_t{kQ + 2 * kKv} * dim;
        const std::vector<float> qkv = Exact(kRows * width);
        const std::vector<float> bias = Numbers(width);
        const std::vector<float> q_norm = Numbers(dim);
        const std::vector<float> k_norm = Numbers(dim);
        RopeConfig rope;
        const std::vector<float> frequencies = InverseFrequencies(rope, dim);

        const auto d_qkv = Typed(qkv);
        const auto d_bias = Upload(bias);
        const auto d_q_norm = Upload(q_norm);
        const auto d_k_norm = Upload(k_norm);
        const auto d_frequencies = Upload(frequencies);
        const auto d_positions = Upload(positions);
        const auto d_blocks = Upload(blocks);
        const auto q = Room(size_t{kRows} * kQ * dim);
        const SplitQkv args = {.dtype = GetParam(),
                               .query_heads = kQ,
                               .kv_heads = kKv,
                               .head_dim = dim,
                               .eps = 1e-6F,
                               .qkv = d_qkv.get(),
                               .bias = extras ? d_bias.get() : nullptr,
                               .q_norm = extras ? d_q_norm.get() : nullptr,
                               .k_norm = extras ? d_k_norm.get() : nullptr,
                               .inverse_frequencies = d_frequencies.get(),
                               .positions = d_positions.get(),
                               .blocks = d_blocks.get(),
                               .q = q.get(),
                               .cache = {.k = device.K(1, 0, 0, 0),
                                         .v = device.V(1, 0, 0, 0),
                                         .block_stride = layout.block_stride,
                                         .head_stride = layout.head_stride,
                                         .token_stride = layout.token_stride,
                                         .block_size = layout.block_size,
                                         .dtype = cache}};
        ASSERT_TRUE(SplitAndStore(args, kRows, nullptr).ok());

        const RopeTable table(frequencies, positions);
        std::vector<float> want_q;
        for (uint32_t row = 0; row < kRows; ++row) {
          std::vector<float> values(qkv.begin() + row * width, qkv.begin() + (row + 1) * width);
          for (size_t i = 0; extras && i < width; ++i) values[i] += bias[i];
          for (uint32_t head = 0; extras && head < kQ + kKv; ++head) {
            float* at = values.data() + size_t{head} * dim;
            double squares = 0;
            for (uint32_t i = 0; i < dim; ++i) squares += double{at[i]} * at[i];
            const auto scale = static_cast<float>(1 / std::sqrt(squares / dim + 1e-6));
            for (uint32_t i = 0; i < dim; ++i) at[i] *= scale * (head < kQ ? q_norm : k_norm)[i];
          }
          table.Rotate(row, values.data(), kQ + kKv);
          want_q.insert(want_q.end(), values.begin(), values.begin() + kQ * dim);
          if (blocks[row] == kNoBlock) continue;
          WriteKv(host, 1, blocks[row], positions[row] % 4, values.data() + size_t{kQ} * dim,
                  values.data() + size_t{kQ + kKv} * dim);
        }
        ExpectClose(Wide(q, want_q.size()), want_q, 4 * Tolerance(GetParam()));
        // Angles of position 4000 differ in their last bits.
        const auto got_cache = Download(device_cache.get(), want_cache.size());
        const float bound = std::max(Tolerance(cache), 5e-4F);
        for (size_t at = 0; at < want_cache.size(); at += SizeOf(cache)) {
          const float want = Load(cache, want_cache.data() + at);
          ASSERT_LE(std::fabs(Load(cache, got_cache.data() + at) - want),
                    bound * std::max(1.0F, std::fabs(want)))
              << at << " of " << layout.ToString();
        }
      }
    }
  }
}

TEST_P(KernelsCudaTest, SwiGluOfGateAndUp) {
  constexpr uint32_t kRows = 3;
  constexpr uint32_t kWidth = 700;
  const std::vector<float> gate_up = Exact(size_t{kRows} * 2 * kWidth, 3);
  const std::vector<float> bias = Numbers(size_t{2} * kWidth);
  const auto device = Typed(gate_up);
  const auto biases = Upload(bias);
  for (const bool with_bias : {false, true}) {
    const auto out = Room(size_t{kRows} * kWidth);
    ASSERT_TRUE(SwiGlu(GetParam(), device.get(), with_bias ? biases.get() : nullptr, kRows, kWidth,
                       out.get(), nullptr)
                    .ok());
    std::vector<float> want;
    for (uint32_t row = 0; row < kRows; ++row) {
      for (uint32_t i = 0; i < kWidth; ++i) {
        const float* from = gate_up.data() + size_t{row} * 2 * kWidth;
        const double gate = from[i] + (with_bias ? bias[i] : 0);
        const double up = from[kWidth + i] + (with_bias ? bias[kWidth + i] : 0);
        want.push_back(static_cast<float>(gate / (1 + std::exp(-gate)) * up));
      }
    }
    ExpectClose(Wide(out, want.size()), want, Tolerance(GetParam()));
  }
}

TEST_P(KernelsCudaTest, ProductsInTheirTypeAndInFp32) {
  constexpr uint32_t kRows = 7;
  constexpr uint32_t kIn = 72;
  constexpr uint32_t kOut = 83;
  const std::vector<float> x = Exact(kRows * kIn);
  const std::vector<float> weights = Exact(kOut * kIn);
  const std::vector<float> before = Numbers(kRows * kOut);
  auto stream = MakeStream();
  ASSERT_TRUE(stream);
  const auto blas = Blas::Create(stream->get());
  ASSERT_TRUE(blas) << blas.error().ToString();
  const auto d_x = Typed(x);
  const auto d_weights = Typed(weights);
  const auto typed = Room(kRows * kOut);
  const auto sums = Upload(before);
  ASSERT_TRUE(blas->Multiply(GetParam(), d_x.get(), kRows, kIn, d_weights.get(), kOut, GetParam(),
                             typed.get(), false)
                  .ok());
  ASSERT_TRUE(blas->Multiply(GetParam(), d_x.get(), kRows, kIn, d_weights.get(), kOut, DType::kFp32,
                             sums.get(), true)
                  .ok());
  cudaDeviceSynchronize();
  std::vector<float> want(kRows * kOut);
  std::vector<float> want_sums(kRows * kOut);
  for (uint32_t row = 0; row < kRows; ++row) {
    for (uint32_t o = 0; o < kOut; ++o) {
      double sum = 0;
      for (uint32_t k = 0; k < kIn; ++k) sum += double{x[row * kIn + k]} * weights[o * kIn + k];
      want[row * kOut + o] = static_cast<float>(sum);
      want_sums[row * kOut + o] = static_cast<float>(sum + before[row * kOut + o]);
    }
  }
  ExpectClose(Wide(typed, want.size()), want, Tolerance(GetParam()), 8);
  ExpectClose(Download(sums.get(), want.size()), want_sums, Tolerance(DType::kFp32), 16);
}

TEST_P(KernelsCudaTest, PartsAndBiasesAreAdded) {
  constexpr uint32_t kRows = 3;
  constexpr uint32_t kWidth = 300;
  const std::vector<float> x = Numbers(kRows * kWidth);
  std::vector<std::vector<float>> parts;
  std::vector<DeviceBuffer<float>> device;
  Parts args;
  for (args.ranks = 0; args.ranks < 3; ++args.ranks) {
    parts.push_back(Numbers(kRows * kWidth));
    device.push_back(Upload(parts.back()));
    args.of_rank[args.ranks] = device.back().get();
  }
  const std::vector<float> bias = Numbers(kWidth);
  const auto d_bias = Upload(bias);
  const auto sum = Upload(x);
  ASSERT_TRUE(AddParts(args, x.size(), sum.get(), nullptr).ok());
  ASSERT_TRUE(AddBias(d_bias.get(), kRows, kWidth, sum.get(), nullptr).ok());
  std::vector<float> want(x.size());
  for (size_t i = 0; i < x.size(); ++i) {
    want[i] = x[i] + ((parts[0][i] + parts[1][i]) + parts[2][i]) + bias[i % kWidth];
  }
  EXPECT_EQ(Download(sum.get(), x.size()), want);
}

// Random logits, many equal ones, NaN among numbers, and nothing but NaN.
TEST_P(KernelsCudaTest, TheLikeliestIsTheHostsChoice) {
  constexpr uint32_t kWidth = 1003;
  std::vector<float> logits = Numbers(size_t{4} * kWidth);
  for (size_t i = kWidth; i < size_t{2} * kWidth; ++i) logits[i] = std::round(logits[i]);
  for (size_t i = size_t{2} * kWidth; i < size_t{3} * kWidth; i += 2) logits[i] = NAN;
  std::fill(logits.begin() + 3 * kWidth, logits.end(), NAN);
  const auto device = Upload(logits);
  const auto out = Upload(std::vector<ScoredToken>(4));
  ASSERT_TRUE(Likeliest(device.get(), 4, kWidth, 5000, out.get(), nullptr).ok());
  const auto got = Download(out.get(), 4);
  for (size_t row = 0; row < 4; ++row) {
    const auto of_row = std::span<const float>(logits).subspan(row * kWidth, kWidth);
    EXPECT_EQ(got[row].id, 5000 + Greedy(of_row)) << row;
    EXPECT_TRUE(row == 3 || got[row].logit == of_row[Greedy(of_row)]) << row;
  }
}

INSTANTIATE_TEST_SUITE_P(Types, KernelsCudaTest,
                         testing::Values(DType::kFp32, DType::kFp16, DType::kBf16),
                         [](const auto& info) { return std::string(DTypeName(info.param)); });

}  // namespace
}  // namespace kvrelay::engine::cuda
