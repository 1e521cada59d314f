#include "tests/cuda/paged_cuda_case.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <numeric>

#include "base/parallel.h"
#include "kvcache/convert.h"

namespace kvrelay::attention::cuda {
namespace {

uint32_t BlocksFor(uint32_t tokens, uint32_t block_size) {
  return (tokens + block_size - 1) / block_size;
}

uint32_t OwnTokens(const PagedCudaShape& shape, const SequenceLengths& lengths) {
  const uint32_t shared = lengths.prefix == kNoPrefix ? 0 : shape.prefixes[lengths.prefix];
  return shared <= lengths.context ? lengths.context - shared : lengths.context;
}

uint32_t CountBlocks(const PagedCudaShape& shape) {
  uint32_t blocks = 3;  // of nobody
  for (const SequenceLengths& lengths : shape.sequences) {
    blocks += BlocksFor(OwnTokens(shape, lengths), shape.kernels.block_size);
  }
  for (const uint32_t tokens : shape.prefixes) blocks += tokens / shape.kernels.block_size;
  return blocks;
}

uint32_t CountRows(const PagedCudaShape& shape) {
  uint32_t rows = 0;
  for (const SequenceLengths& lengths : shape.sequences) rows += lengths.rows;
  return rows;
}

PagedKernels MakePagedKernels(const PagedCudaShape& shape) {
  PagedShape kernels = shape.kernels;
  kernels.max_sequences = static_cast<uint32_t>(shape.sequences.size());
  kernels.max_rows = std::max(1U, CountRows(shape));
  kernels.scale = 1.0F / std::sqrt(static_cast<float>(kernels.head_dim));
  Result<PagedKernels> made = PagedKernels::Create(kernels);
  if (!made) {
    std::fprintf(stderr, "%s\n", made.error().ToString().c_str());
    std::abort();
  }
  return *std::move(made);
}

size_t LongestTable(const std::vector<std::vector<BlockId>>& tables) {
  size_t longest = 1;
  for (const auto& table : tables) longest = std::max(longest, table.size());
  return longest;
}

// All tables in rows of one length; what nobody has is a block that does not exist.
std::vector<uint32_t> Flat(const std::vector<std::vector<BlockId>>& tables) {
  const size_t stride = LongestTable(tables);
  std::vector<uint32_t> flat(std::max<size_t>(1, tables.size()) * stride, 0xffffffff);
  for (size_t i = 0; i < tables.size(); ++i) {
    std::ranges::copy(tables[i], flat.begin() + static_cast<ptrdiff_t>(i * stride));
  }
  return flat;
}

void StoreNumber(DType dtype, std::byte* row, size_t index, float value) {
  WithNumber(dtype, [&](auto number) {
    const auto bits = decltype(number)::FromFloat(value);
    std::memcpy(row + index * sizeof(bits), &bits, sizeof(bits));
  });
}

float LoadNumber(DType dtype, const std::byte* row, size_t index) {
  return WithNumber(dtype, [&](auto number) {
    typename decltype(number)::Bits bits;
    std::memcpy(&bits, row + index * sizeof(bits), sizeof(bits));
    return decltype(number)::ToFloat(bits);
  });
}

}  // namespace

bool PagedCudaShape::decode_rows() const {
  return std::ranges::all_of(sequences, [](const SequenceLengths& s) { return s.rows == 1; });
}

std::string PagedCudaShape::ToString() const {
  std::string text = std::to_string(kernels.query_heads) + "/" + std::to_string(kernels.kv_heads) +
                     " heads of " + std::to_string(kernels.head_dim) + "/" +
                     std::to_string(kernels.value_dim) + ", " +
                     std::string(DTypeName(kernels.dtype)) + " over " +
                     std::string(DTypeName(kernels.cache_dtype)) + ", blocks of " +
                     std::to_string(kernels.block_size) + (nhd ? " nhd" : " hnd") +
                     (interleaved ? " interleaved" : "") + (mla ? " mla" : "") + ", gap " +
                     std::to_string(gap_bytes) + ", window " + std::to_string(kernels.window) +
                     ", soft cap " + std::to_string(soft_cap) + (alibi ? ", alibi" : "") +
                     ", scales " + std::to_string(static_cast<int>(scales)) + ", prefixes";
  for (const uint32_t tokens : prefixes) text += " " + std::to_string(tokens);
  text += ", sequences";
  for (const SequenceLengths& s : sequences) {
    text += " " + std::to_string(s.rows) + "@" + std::to_string(s.context) +
            (s.prefix == kNoPrefix ? "" : ":" + std::to_string(s.prefix));
  }
  return text;
}

bool PagedCudaOutput::operator==(const PagedCudaOutput& other) const {
  return out == other.out &&
         std::memcmp(lse.data(), other.lse.data(), lse.size() * sizeof(float)) == 0;
}

PagedCudaContents::PagedCudaContents(const PagedCudaShape& of, uint64_t seed) : shape(of) {
  std::mt19937_64 random(seed);
  PagedShape& kernels = shape.kernels;
  if (kernels.value_dim == 0) kernels.value_dim = kernels.head_dim;
  const uint32_t num_blocks = CountBlocks(shape);
  const uint64_t row = uint64_t{kernels.head_dim} * SizeOf(kernels.cache_dtype);
  const uint64_t step = row * (shape.interleaved ? 2 : 1) + shape.gap_bytes;
  cache.num_blocks = num_blocks;
  cache.token_stride = shape.nhd ? step * kernels.kv_heads : step;
  cache.head_stride = shape.nhd ? step : step * kernels.block_size;
  cache.block_stride = step * kernels.kv_heads * kernels.block_size;
  k.assign(num_blocks * cache.block_stride, std::byte{0xff});
  if (!shape.interleaved && !shape.mla) v = k;

  std::vector<BlockId> ids(num_blocks);
  std::iota(ids.begin(), ids.end(), 0);
  std::ranges::shuffle(ids, random);
  const auto take = [&](uint32_t tokens) {
    const auto count = static_cast<ptrdiff_t>(BlocksFor(tokens, kernels.block_size));
    std::vector<BlockId> taken(ids.end() - count, ids.end());
    ids.resize(ids.size() - taken.size());
    FillTokens(taken, tokens, random);
    return taken;
  };
  for (const uint32_t tokens : shape.prefixes) prefix_tables.push_back(take(tokens));
  for (const SequenceLengths& lengths : shape.sequences) {
    tables.push_back(take(OwnTokens(shape, lengths)));
  }

  std::normal_distribution<float> normal;
  const size_t elements = size_t{CountRows(shape)} * kernels.query_heads * kernels.head_dim;
  q.resize(elements * SizeOf(kernels.dtype));
  for (size_t i = 0; i < elements; ++i) {
    StoreNumber(kernels.dtype, q.data(), i, normal(random) * shape.logits / 4);
  }
  std::uniform_real_distribution<float> scale(0.5F, 2.0F);
  const size_t count = shape.scales == CaseScales::kNone     ? 0
                       : shape.scales == CaseScales::kTensor ? 1
                       : shape.scales == CaseScales::kHead
                           ? kernels.kv_heads
                           : shape.sequences.size() * kernels.kv_heads;
  for (size_t i = 0; i < count; ++i) {
    k_scales.push_back(scale(random));
    v_scales.push_back(scale(random));
  }
  if (shape.alibi) {
    for (uint32_t h = 0; h < kernels.query_heads; ++h) {
      slopes.push_back(
          std::exp2(-8.0F * static_cast<float>(h + 1) / static_cast<float>(kernels.query_heads)));
    }
  }
}

uint64_t PagedCudaContents::RowOffset(uint32_t block, uint32_t head, uint32_t token) const {
  return block * cache.block_stride + head * cache.head_stride + token * cache.token_stride;
}

void PagedCudaContents::FillTokens(const std::vector<BlockId>& blocks, uint32_t tokens,
                                   std::mt19937_64& random) {
  std::normal_distribution<float> normal;
  const PagedShape& kernels = shape.kernels;
  // int8 holds whole numbers: its values are some, and the queries as much smaller.
  const float spread = kernels.cache_dtype == DType::kInt8 ? 24.0F : 1.0F;
  for (uint32_t token = 0; token < tokens; ++token) {
    for (uint32_t head = 0; head < kernels.kv_heads; ++head) {
      const uint64_t at =
          RowOffset(blocks[token / kernels.block_size], head, token % kernels.block_size);
      std::byte* v_row =
          shape.interleaved
              ? k.data() + at + uint64_t{kernels.head_dim} * SizeOf(kernels.cache_dtype)
              : v.data() + at;
      for (uint32_t d = 0; d < kernels.head_dim; ++d) {
        StoreNumber(kernels.cache_dtype, k.data() + at, d, normal(random) * spread);
        if (!shape.mla) StoreNumber(kernels.cache_dtype, v_row, d, normal(random) * spread);
      }
    }
  }
}

float PagedCudaContents::Scale(const std::vector<float>& scales, size_t sequence,
                               uint32_t head) const {
  switch (shape.scales) {
    case CaseScales::kNone:
      return 1;
    case CaseScales::kTensor:
      return scales[0];
    case CaseScales::kHead:
      return scales[head];
    case CaseScales::kSequence:
      break;
  }
  return scales[sequence * shape.kernels.kv_heads + head];
}

KvView PagedCudaContents::Widened(size_t sequence, std::vector<float>& memory) const {
  const PagedShape& kernels = shape.kernels;
  KvLayout layout =
      KvLayout::Dense(shape.mla ? KvFormat::kMla : KvFormat::kHnd, DType::kFp32, 1,
                      kernels.kv_heads, kernels.head_dim, kernels.block_size, cache.num_blocks);
  memory.assign(layout.dense_bytes() / sizeof(float), std::numeric_limits<float>::quiet_NaN());
  KvView view(layout, {reinterpret_cast<std::byte*>(memory.data())});
  const uint64_t row = uint64_t{kernels.head_dim} * SizeOf(kernels.cache_dtype);
  const auto widen = [&](const std::vector<BlockId>& blocks) {
    for (const BlockId block : blocks) {
      for (uint32_t head = 0; head < kernels.kv_heads; ++head) {
        const float k_scale = Scale(k_scales, sequence, head);
        const float v_scale = Scale(v_scales, sequence, head);
        for (uint32_t token = 0; token < kernels.block_size; ++token) {
          const uint64_t at = RowOffset(block, head, token);
          const std::byte* v_row = shape.interleaved ? k.data() + at + row : v.data() + at;
          auto* k_to = reinterpret_cast<float*>(view.K(0, block, head, token));
          for (uint32_t d = 0; d < kernels.head_dim; ++d) {
            k_to[d] = LoadNumber(kernels.cache_dtype, k.data() + at, d) * k_scale;
          }
          if (shape.mla) continue;
          auto* v_to = reinterpret_cast<float*>(view.V(0, block, head, token));
          for (uint32_t d = 0; d < kernels.head_dim; ++d) {
            v_to[d] = LoadNumber(kernels.cache_dtype, v_row, d) * v_scale;
          }
        }
      }
    }
  };
  widen(tables[sequence]);
  const uint32_t prefix = shape.sequences[sequence].prefix;
  if (prefix != kNoPrefix) widen(prefix_tables[prefix]);
  return view;
}

PagedCudaCase::PagedCudaCase(const PagedCudaShape& shape, uint64_t seed)
    : contents_(shape, seed),
      kernels_(MakePagedKernels(shape)),
      k_(contents_.k),
      v_(contents_.v),
      q_(contents_.q),
      out_(size_t{CountRows(shape)} * shape.kernels.query_heads *
           contents_.shape.kernels.value_dim * SizeOf(shape.kernels.dtype)),
      lse_(size_t{CountRows(shape)} * shape.kernels.query_heads),
      k_scales_(contents_.k_scales),
      v_scales_(contents_.v_scales),
      slopes_(contents_.slopes),
      contexts_(shape.sequences.size()),
      first_rows_(shape.sequences.size() + 1),
      prefixes_(shape.sequences.size()),
      prefix_tokens_(shape.prefixes),
      blocks_(Flat(contents_.tables)),
      prefix_blocks_(Flat(contents_.prefix_tables)),
      workspace_(kernels_.workspace_bytes()) {
  workspace_.Poison();
  const PagedShape& kernels = contents_.shape.kernels;
  layer_.cache = contents_.cache;
  layer_.cache.k = k_.get();
  layer_.cache.v = shape.mla ? nullptr
                   : shape.interleaved
                       ? k_.get() + size_t{kernels.head_dim} * SizeOf(kernels.cache_dtype)
                       : v_.get();
  layer_.soft_cap = shape.soft_cap;
  if (shape.alibi) layer_.alibi_slopes = slopes_.get();
  if (shape.scales != CaseScales::kNone) {
    layer_.scales = {k_scales_.get(), v_scales_.get(),
                     shape.scales == CaseScales::kSequence ? kernels.kv_heads : 0,
                     shape.scales == CaseScales::kTensor ? 0U : 1U};
  }
  batch_.requests = {contexts_.get(),
                     shape.prefixes.empty() ? nullptr : prefixes_.get(),
                     blocks_.get(),
                     static_cast<uint32_t>(LongestTable(contents_.tables)),
                     prefix_tokens_.get(),
                     prefix_blocks_.get(),
                     static_cast<uint32_t>(LongestTable(contents_.prefix_tables))};
  batch_.first_rows = shape.decode_rows() ? nullptr : first_rows_.get();
  SetLengths(shape.sequences);
}

void PagedCudaCase::SetLengths(const std::vector<SequenceLengths>& sequences) {
  now_ = sequences;
  std::vector<uint32_t> contexts;
  std::vector<uint32_t> first_rows = {0};
  std::vector<uint32_t> prefixes;
  for (const SequenceLengths& s : sequences) {
    contexts.push_back(s.context);
    first_rows.push_back(first_rows.back() + s.rows);
    prefixes.push_back(s.prefix);
  }
  contexts_.Upload(contexts);
  first_rows_.Upload(first_rows);
  prefixes_.Upload(prefixes);
}

void PagedCudaCase::Launch(Stream stream) {
  Status status = kernels_.Schedule(batch_, workspace_.get(), stream);
  if (status.ok()) {
    status =
        kernels_.Attend(layer_, batch_, q_.get(), out_.get(), lse_.get(), workspace_.get(), stream);
  }
  ASSERT_TRUE(status.ok()) << status.ToString();
}

void PagedCudaCase::Poison() {
  out_.Poison();
  lse_.Poison();
}

PagedCudaOutput PagedCudaCase::Read() const {
  KVRELAY_CUDA(cudaDeviceSynchronize());
  return {out_.Download(), lse_.Download()};
}

PagedCudaOutput PagedCudaCase::Run() {
  Poison();
  Launch(nullptr);
  return Read();
}

void PagedCudaCase::ExpectRight(const PagedCudaOutput& got) const {
  const PagedCudaShape& shape = contents_.shape;
  const PagedShape& kernels = kernels_.shape();
  // Products of 16-bit numbers: weights and results are rounded to them. An 8-bit cache's are fp16.
  double tolerance = kernels.dtype == DType::kBf16   ? 1e-2
                     : kernels.dtype == DType::kFp16 ? 3e-3
                                                     : 3e-5;
  if (shape.logits > 100) tolerance = std::max(tolerance, 2e-2);
  std::vector<uint32_t> first_rows = {0};
  for (const SequenceLengths& s : now_) first_rows.push_back(first_rows.back() + s.rows);
  std::vector<std::string> wrong(now_.size());
  const auto check = [&](size_t index) {
    const SequenceLengths& lengths = now_[index];
    std::vector<float> memory;
    const KvView view = contents_.Widened(index, memory);
    Sequence sequence;
    sequence.rows = lengths.rows;
    sequence.context = lengths.context;
    sequence.blocks = contents_.tables[index];
    if (lengths.prefix != kNoPrefix && shape.prefixes[lengths.prefix] <= lengths.context) {
      sequence.prefix = contents_.prefix_tables[lengths.prefix];
    }
    const size_t row_heads = size_t{lengths.rows} * kernels.query_heads;
    const size_t first = size_t{first_rows[index]} * kernels.query_heads;
    std::vector<float> q(row_heads * kernels.head_dim);
    for (size_t i = 0; i < q.size(); ++i) {
      q[i] = LoadNumber(kernels.dtype, contents_.q.data(), first * kernels.head_dim + i);
    }
    std::vector<float> want(q.size());
    std::vector<float> want_lse(row_heads);
    const Batch batch{.sequences = {&sequence, 1},
                      .query_heads = kernels.query_heads,
                      .scale = kernels.scale,
                      .kind = {kernels.window, shape.soft_cap, contents_.slopes}};
    NaiveAttention(view, 0, batch, q, want, want_lse);
    for (size_t row = 0; row < row_heads; ++row) {
      double error = 0;
      double norm = 0;
      for (uint32_t d = 0; d < kernels.value_dim; ++d) {
        const double right = want[row * kernels.head_dim + d];
        const double x =
            LoadNumber(kernels.dtype, got.out.data(), (first + row) * kernels.value_dim + d) -
            right;
        error += x * x;
        norm += right * right;
      }
      const float lse = got.lse[first + row];
      const double far = std::abs(double{lse} - want_lse[row]);
      const bool lse_right =
          lse == want_lse[row] || far <= 1e-3 + 1e-5 * std::abs(want_lse[row]);  // not so for NaN
      if (!(std::sqrt(error) <= tolerance * std::sqrt(norm)) || !lse_right) {
        wrong[index] = "sequence " + std::to_string(index) + ", row " +
                       std::to_string(row / kernels.query_heads) + " of " +
                       std::to_string(lengths.rows) + ", query head " +
                       std::to_string(row % kernels.query_heads) + ", " +
                       std::to_string(lengths.context) + " tokens: relative error " +
                       std::to_string(std::sqrt(error / norm)) + ", LSE " + std::to_string(lse) +
                       ", should be " + std::to_string(want_lse[row]);
        return;
      }
    }
  };
  ParallelFor(now_.size(), 1, [&](size_t begin, size_t end) {
    for (size_t index = begin; index < end; ++index) check(index);
  });
  for (const std::string& text : wrong) {
    if (!text.empty()) {
      ADD_FAILURE() << text << "\n" << shape.ToString();
      return;
    }
  }
}

}  // namespace kvrelay::attention::cuda
