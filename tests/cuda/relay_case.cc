#include "tests/cuda/relay_case.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>
#include <limits>
#include <numeric>
#include <thread>

#include "attention/widen.h"

namespace kvrelay::attention::cuda {
namespace {

uint16_t Narrow(DType dtype, float value) {
  if (dtype == DType::kBf16) {
    return static_cast<uint16_t>(std::bit_cast<uint32_t>(value) >> 16);
  }
  // Towards zero, normal numbers only: random inputs need no more.
  const uint32_t bits = std::bit_cast<uint32_t>(value);
  const int exponent = static_cast<int>(bits >> 23 & 255) - 127 + 15;
  if (exponent <= 0) return 0;
  return static_cast<uint16_t>((bits >> 16 & 0x8000) | exponent << 10 | (bits >> 13 & 1023));
}

uint32_t CeilDiv(uint32_t a, uint32_t b) { return (a + b - 1) / b; }

struct Places {
  uint32_t num_blocks = 0;
  uint32_t blocks_stride = 1;
  uint32_t prefix_blocks_stride = 1;
};

Places Count(const CaseShape& shape) {
  Places places;
  for (const RequestLengths& request : shape.requests) {
    const uint32_t blocks = CeilDiv(request.own, shape.block_size);
    places.num_blocks += blocks;
    places.blocks_stride = std::max(places.blocks_stride, blocks);
  }
  for (const uint32_t tokens : shape.prefixes) {
    const uint32_t blocks = tokens / shape.block_size;
    places.num_blocks += blocks;
    places.prefix_blocks_stride = std::max(places.prefix_blocks_stride, blocks);
  }
  places.num_blocks += 3;  // of nobody
  return places;
}

RelayKernels MakeKernels(const CaseShape& shape) {
  RelayShape relay;
  relay.query_heads = shape.query_heads;
  relay.kv_heads = shape.kv_heads;
  relay.head_dim = shape.head_dim;
  relay.dtype = shape.dtype;
  relay.block_size = shape.block_size;
  relay.max_requests = static_cast<uint32_t>(shape.requests.size());
  relay.max_prefixes = static_cast<uint32_t>(shape.prefixes.size());
  relay.scale = 1.0F / std::sqrt(static_cast<float>(shape.head_dim));
  Result<RelayKernels> kernels = RelayKernels::Create(relay);
  if (!kernels) {
    std::fprintf(stderr, "%s\n", kernels.error().ToString().c_str());
    std::abort();
  }
  return *std::move(kernels);
}

size_t TensorElements(const CaseShape& shape) {
  return size_t{Count(shape).num_blocks} * shape.kv_heads * shape.block_size * shape.head_dim;
}

}  // namespace

std::string CaseShape::ToString() const {
  std::string text = std::to_string(query_heads) + "/" + std::to_string(kv_heads) + " heads of " +
                     std::to_string(head_dim) + " " + std::string(DTypeName(dtype)) +
                     ", blocks of " + std::to_string(block_size) + (nhd ? " nhd" : " hnd") +
                     (interleaved ? " interleaved" : "") + ", prefixes";
  for (const uint32_t tokens : prefixes) text += " " + std::to_string(tokens);
  text += ", requests";
  for (const RequestLengths& request : requests) {
    text += " " + (request.prefix == kNoPrefix ? "-" : std::to_string(request.prefix)) + ":" +
            std::to_string(request.own);
  }
  return text;
}

bool CaseOutput::operator==(const CaseOutput& other) const {
  return out == other.out &&
         std::memcmp(lse.data(), other.lse.data(), lse.size() * sizeof(float)) == 0;
}

RelayCase::RelayCase(const CaseShape& shape, uint64_t seed)
    : shape_(shape),
      kernels_(MakeKernels(shape)),
      k_(TensorElements(shape) * (shape.interleaved ? 2 : 1)),
      v_(shape.interleaved ? 0 : k_.size()),
      q_(shape.requests.size() * shape.query_heads * shape.head_dim),
      blocks_stride_(Count(shape).blocks_stride),
      prefix_blocks_stride_(Count(shape).prefix_blocks_stride),
      block_table_(shape.requests.size() * blocks_stride_, 0xffffffff),
      prefix_table_(std::max<size_t>(1, shape.prefixes.size()) * prefix_blocks_stride_, 0xffffffff),
      device_k_(k_.size()),
      device_v_(v_.size()),
      device_q_(q_.size()),
      device_out_(q_.size()),
      device_lse_(shape.requests.size() * shape.query_heads),
      contexts_(shape.requests.size()),
      prefixes_(shape.requests.size()),
      blocks_(block_table_.size()),
      device_prefix_tokens_(std::max<size_t>(1, shape.prefixes.size())),
      prefix_blocks_(prefix_table_.size()),
      workspace_(kernels_.workspace_bytes()) {
  std::mt19937_64 random(seed);
  const uint32_t num_blocks = Count(shape).num_blocks;
  const uint64_t row = uint64_t{shape.head_dim} * 2 * (shape.interleaved ? 2 : 1);
  cache_.num_blocks = num_blocks;
  cache_.token_stride = shape.nhd ? row * shape.kv_heads : row;
  cache_.head_stride = shape.nhd ? row : row * shape.block_size;
  cache_.block_stride = row * shape.kv_heads * shape.block_size;
  cache_.k = device_k_.get();
  cache_.v = shape.interleaved ? device_k_.get() + shape.head_dim : device_v_.get();

  std::vector<uint32_t> ids(num_blocks);
  std::iota(ids.begin(), ids.end(), 0);
  std::shuffle(ids.begin(), ids.end(), random);
  const auto take = [&] {
    const uint32_t id = ids.back();
    ids.pop_back();
    return id;
  };
  for (size_t r = 0; r < shape.requests.size(); ++r) {
    for (uint32_t b = 0; b < CeilDiv(shape.requests[r].own, shape.block_size); ++b) {
      block_table_[r * blocks_stride_ + b] = take();
    }
  }
  for (size_t p = 0; p < shape.prefixes.size(); ++p) {
    for (uint32_t b = 0; b < shape.prefixes[p] / shape.block_size; ++b) {
      prefix_table_[p * prefix_blocks_stride_ + b] = take();
    }
  }
  std::normal_distribution<float> normal(0, 1);
  for (uint16_t& x : q_) x = Narrow(shape.dtype, normal(random) * shape.logits / 4);
  device_q_.Upload(q_);
  blocks_.Upload(block_table_);
  prefix_blocks_.Upload(prefix_table_);

  std::ranges::fill(k_, 0xffff);
  std::ranges::fill(v_, 0xffff);
  std::vector<uint16_t>& v = shape.interleaved ? k_ : v_;
  const auto fill = [&](uint32_t block, uint32_t tokens) {
    for (uint32_t head = 0; head < shape.kv_heads; ++head) {
      for (uint32_t token = 0; token < tokens; ++token) {
        const uint64_t at = RowOffset(block, head, token) / 2;
        const uint64_t v_at = at + (shape.interleaved ? shape.head_dim : 0);
        for (uint32_t d = 0; d < shape.head_dim; ++d) {
          k_[at + d] = Narrow(shape.dtype, normal(random));
          v[v_at + d] = Narrow(shape.dtype, normal(random));
        }
      }
    }
  };
  for (size_t r = 0; r < shape.requests.size(); ++r) {
    const uint32_t own = shape.requests[r].own;
    for (uint32_t at = 0; at < own; at += shape.block_size) {
      fill(block_table_[r * blocks_stride_ + at / shape.block_size],
           std::min(shape.block_size, own - at));
    }
  }
  for (size_t p = 0; p < shape.prefixes.size(); ++p) {
    for (uint32_t at = 0; at < shape.prefixes[p]; at += shape.block_size) {
      fill(prefix_table_[p * prefix_blocks_stride_ + at / shape.block_size], shape.block_size);
    }
  }
  device_k_.Upload(k_);
  device_v_.Upload(v_);
  workspace_.Poison();
  batch_ = {contexts_.get(),
            prefixes_.get(),
            blocks_.get(),
            blocks_stride_,
            device_prefix_tokens_.get(),
            prefix_blocks_.get(),
            prefix_blocks_stride_};
  const Result<LayerMaps> maps = kernels_.MapLayer(cache_);
  if (!maps) {
    std::fprintf(stderr, "%s\n", maps.error().ToString().c_str());
    std::abort();
  }
  maps_ = *maps;
  SetLengths(shape.requests, shape.prefixes);
}

void RelayCase::SetLengths(const std::vector<RequestLengths>& requests,
                           const std::vector<uint32_t>& prefixes) {
  now_ = requests;
  prefix_tokens_ = prefixes;
  std::vector<uint32_t> contexts;
  std::vector<uint32_t> ids;
  for (const RequestLengths& request : requests) {
    contexts.push_back(request.own + (request.prefix == kNoPrefix ? 0 : prefixes[request.prefix]));
    ids.push_back(request.prefix);
  }
  contexts_.Upload(contexts);
  prefixes_.Upload(ids);
  device_prefix_tokens_.Upload(prefixes);
}

uint64_t RelayCase::RowOffset(uint32_t block, uint32_t head, uint32_t token) const {
  return block * cache_.block_stride + head * cache_.head_stride + token * cache_.token_stride;
}

double RelayCase::Element(const std::vector<uint16_t>& memory, uint64_t offset, uint32_t i) const {
  return Widen(shape_.dtype, reinterpret_cast<const std::byte*>(memory.data()) + offset, i);
}

void RelayCase::Poison() {
  device_out_.Poison();
  device_lse_.Poison();
}

void RelayCase::Launch(RelayMode mode, Stream stream) {
  Status status = kernels_.Schedule(batch_, mode, workspace_.get(), stream);
  if (status.ok()) {
    status = kernels_.Attend(maps_, batch_, device_q_.get(), device_out_.get(), device_lse_.get(),
                             workspace_.get(), stream);
  }
  ASSERT_TRUE(status.ok()) << status.ToString();
}

void RelayCase::Enqueue(RelayMode mode, Stream stream) {
  Poison();
  Launch(mode, stream);
}

CaseOutput RelayCase::Read() const {
  KVRELAY_CUDA(cudaDeviceSynchronize());
  return {device_out_.Download(), device_lse_.Download()};
}

CaseOutput RelayCase::Run(RelayMode mode) {
  Enqueue(mode, nullptr);
  return Read();
}

void RelayCase::ExpectRight(const CaseOutput& got) const {
  const uint32_t dim = shape_.head_dim;
  const uint32_t rows = static_cast<uint32_t>(now_.size()) * shape_.query_heads;
  const std::vector<uint16_t>& v = shape_.interleaved ? k_ : v_;
  const uint64_t v_offset = shape_.interleaved ? uint64_t{dim} * 2 : 0;
  const double tolerance = shape_.dtype == DType::kBf16 ? 1e-2 : 2e-3;
  std::vector<std::string> wrong(rows);
  const auto check = [&](uint32_t row) {
    const uint32_t r = row / shape_.query_heads;
    const uint32_t head = row % shape_.query_heads / (shape_.query_heads / shape_.kv_heads);
    const RequestLengths& lengths = now_[r];
    const uint32_t shared = lengths.prefix == kNoPrefix ? 0 : prefix_tokens_[lengths.prefix];
    const uint32_t tokens = shared + lengths.own;
    std::vector<double> logits(tokens);
    std::vector<uint64_t> places(tokens);
    double max = -std::numeric_limits<double>::infinity();
    for (uint32_t t = 0; t < tokens; ++t) {
      const uint32_t block =
          t < shared ? prefix_table_[lengths.prefix * prefix_blocks_stride_ + t / shape_.block_size]
                     : block_table_[r * blocks_stride_ + (t - shared) / shape_.block_size];
      places[t] = RowOffset(block, head, t % shape_.block_size);
      double dot = 0;
      for (uint32_t d = 0; d < dim; ++d) {
        dot += Element(q_, uint64_t{row} * dim * 2, d) * Element(k_, places[t], d);
      }
      logits[t] = dot * kernels_.shape().scale;
      max = std::max(max, logits[t]);
    }
    std::vector<double> want(dim, 0.0);
    double sum = 0;
    for (uint32_t t = 0; t < tokens; ++t) {
      const double p = std::exp(logits[t] - max);
      sum += p;
      for (uint32_t d = 0; d < dim; ++d) want[d] += p * Element(v, places[t] + v_offset, d);
    }
    double error = 0;
    double norm = 0;
    for (uint32_t d = 0; d < dim; ++d) {
      if (sum > 0) want[d] /= sum;
      const double x = Element(got.out, uint64_t{row} * dim * 2, d) - want[d];
      error += x * x;
      norm += want[d] * want[d];
    }
    const double lse = sum > 0 ? max + std::log(sum) : max;
    const double lse_error = std::abs(got.lse[row] - lse);
    const bool lse_right = tokens == 0
                               ? got.lse[row] == -std::numeric_limits<float>::infinity()
                               : lse_error <= 1e-3 + 1e-5 * std::abs(lse);  // not so for NaN
    if (!(std::sqrt(error) <= tolerance * std::sqrt(norm)) || !lse_right) {
      wrong[row] = "request " + std::to_string(r) + ", query head " +
                   std::to_string(row % shape_.query_heads) + ", " + std::to_string(shared) + "+" +
                   std::to_string(lengths.own) + " tokens: relative error " +
                   std::to_string(std::sqrt(error / norm)) + ", LSE " +
                   std::to_string(got.lse[row]) + ", should be " + std::to_string(lse);
    }
  };
  const uint32_t workers = std::max(1U, std::thread::hardware_concurrency());
  std::vector<std::thread> threads;
  for (uint32_t w = 0; w < workers; ++w) {
    threads.emplace_back([&, w] {
      for (uint32_t row = w; row < rows; row += workers) check(row);
    });
  }
  for (std::thread& thread : threads) thread.join();
  const auto count = std::ranges::count_if(wrong, [](const auto& text) { return !text.empty(); });
  for (const std::string& text : wrong) {
    if (text.empty()) continue;
    ADD_FAILURE() << count << " of " << rows << " rows are wrong; " << text << "\n"
                  << shape_.ToString();
    return;
  }
}

}  // namespace kvrelay::attention::cuda
