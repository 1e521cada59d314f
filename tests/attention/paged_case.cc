#include "tests/attention/paged_case.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>
#include <limits>
#include <numeric>

#include "base/parallel.h"
#include "kvcache/convert.h"

namespace kvrelay::attention {
namespace {

// Such that numbers of the size of 1 use much of what one byte can hold.
std::vector<float> RandomScales(size_t count, std::mt19937_64& random) {
  std::uniform_real_distribution<float> scale(0.03F, 0.06F);
  std::vector<float> scales(count);
  std::ranges::generate(scales, [&] { return scale(random); });
  return scales;
}

KvLayout MakeLayout(const CacheShape& shape, std::mt19937_64& random) {
  KvLayout layout;
  layout.dtype = shape.dtype;
  layout.format = shape.format;
  layout.block_size = shape.block_size;
  layout.num_blocks = shape.num_blocks;
  layout.kv_heads = shape.kv_heads;
  layout.head_dim = shape.head_dim;
  const uint64_t row = uint64_t{shape.head_dim + shape.gap} * SizeOf(shape.dtype);
  if (shape.format != KvFormat::kHnd) {
    layout.head_stride = row;
    layout.token_stride = row * shape.kv_heads;
  } else {
    layout.token_stride = row;
    layout.head_stride = row * shape.block_size;
  }
  layout.block_stride = row * shape.kv_heads * shape.block_size;
  for (uint32_t layer = 0; layer < shape.layers; ++layer) {
    layout.k.push_back({0, layer * layout.block_stride * shape.num_blocks});
    if (shape.format == KvFormat::kMla) continue;
    layout.v.push_back({1, layer * layout.block_stride * shape.num_blocks});
  }
  if (shape.scaled) {
    const size_t count = size_t{shape.layers} * (shape.per_head ? shape.kv_heads : 1);
    layout.scales.per_head = shape.per_head;
    layout.scales.k = RandomScales(count, random);
    if (layout.has_v()) layout.scales.v = RandomScales(count, random);
  }
  return layout;
}

size_t RegionBytes(const CacheShape& shape) {
  const size_t row = size_t{shape.head_dim + shape.gap} * SizeOf(shape.dtype);
  return row * shape.kv_heads * shape.block_size * shape.num_blocks * shape.layers;
}

}  // namespace

std::string CacheShape::ToString() const {
  return std::string(DTypeName(dtype)) + " " + std::string(KvFormatName(format)) + ", " +
         std::to_string(kv_heads) + " KV heads of " + std::to_string(head_dim) + ", blocks of " +
         std::to_string(block_size) + ", gap " + std::to_string(gap) +
         (!scaled    ? ""
          : per_head ? ", a scale for each head"
                     : ", a scale for each layer");
}

void DrawNumbers(CacheShape& shape, std::mt19937_64& random) {
  shape.dtype = static_cast<DType>(random() % 6);
  shape.scaled = random() % 2 == 0;
  shape.per_head = random() % 2 == 0;
}

void StoreElement(DType dtype, std::byte* row, uint32_t index, float value) {
  std::byte* const to = row + size_t{index} * SizeOf(dtype);
  if (dtype == DType::kFp32) {  // infinities stay
    std::memcpy(to, &value, sizeof(value));
    return;
  }
  ConvertRun(DType::kFp32, reinterpret_cast<const std::byte*>(&value), dtype, to, 1, 1.0F);
}

// All bits set is a NaN in each of the types that have one.
PagedCase::PagedCase(const CacheShape& shape, uint64_t seed)
    : shape_(shape),
      random_(seed),
      k_memory_(RegionBytes(shape), std::byte{0xFF}),
      v_memory_(RegionBytes(shape), std::byte{0xFF}),
      view_(MakeLayout(shape, random_), {k_memory_.data(), v_memory_.data()}),
      free_(shape.num_blocks) {
  std::iota(free_.begin(), free_.end(), 0);
  std::ranges::shuffle(free_, random_);
}

std::vector<BlockId> PagedCase::TakeBlocks(uint32_t count) {
  if (count > free_.size()) ADD_FAILURE() << "the test needs more blocks";
  std::vector<BlockId> taken(free_.end() - count, free_.end());
  free_.resize(free_.size() - count);
  return taken;
}

void PagedCase::FillTokens(const std::vector<BlockId>& blocks, uint32_t tokens) {
  std::normal_distribution<float> normal;
  for (uint32_t layer = 0; layer < shape_.layers; ++layer) {
    for (uint32_t token = 0; token < tokens; ++token) {
      const BlockId block = blocks[token / shape_.block_size];
      const uint32_t slot = token % shape_.block_size;
      for (uint32_t head = 0; head < shape_.kv_heads; ++head) {
        for (uint32_t d = 0; d < shape_.head_dim; ++d) {
          StoreElement(shape_.dtype, view_.K(layer, block, head, slot), d,
                       normal(random_) / view_.KScale(layer, head));
          if (view_.layout().has_v()) {
            StoreElement(shape_.dtype, view_.V(layer, block, head, slot), d,
                         normal(random_) / view_.VScale(layer, head));
          }
        }
      }
    }
  }
}

void PagedCase::SetK(const std::vector<BlockId>& blocks, uint32_t token, uint32_t head,
                     uint32_t dim, float value) {
  for (uint32_t layer = 0; layer < shape_.layers; ++layer) {
    StoreElement(shape_.dtype,
                 view_.K(layer, blocks[token / shape_.block_size], head, token % shape_.block_size),
                 dim, value);
  }
}

const std::vector<BlockId>& PagedCase::AddPrefix(uint32_t blocks,
                                                 const std::vector<BlockId>* parent) {
  const std::vector<BlockId> fresh = TakeBlocks(blocks);
  FillTokens(fresh, blocks * shape_.block_size);
  auto table = parent == nullptr ? std::make_unique<std::vector<BlockId>>()
                                 : std::make_unique<std::vector<BlockId>>(*parent);
  table->insert(table->end(), fresh.begin(), fresh.end());
  tables_.push_back(std::move(table));
  return *tables_.back();
}

void PagedCase::AddSequence(uint32_t rows, uint32_t context, const std::vector<BlockId>* prefix) {
  const auto shared = static_cast<uint32_t>(prefix == nullptr ? 0 : prefix->size());
  const uint32_t own = context - std::min(context, shared * shape_.block_size);
  tables_.push_back(std::make_unique<std::vector<BlockId>>(
      TakeBlocks((own + shape_.block_size - 1) / shape_.block_size)));
  FillTokens(*tables_.back(), own);
  Sequence sequence;
  sequence.first_row = rows_;
  sequence.rows = rows;
  sequence.context = context;
  if (prefix != nullptr) sequence.prefix = *prefix;
  sequence.blocks = *tables_.back();
  sequences_.push_back(sequence);
  rows_ += rows;
}

Output Unwritten(uint32_t rows, uint32_t query_heads, uint32_t head_dim) {
  constexpr float kNan = std::numeric_limits<float>::quiet_NaN();
  return {std::vector<float>(size_t{rows} * query_heads * head_dim, kNan),
          std::vector<float>(size_t{rows} * query_heads, kNan)};
}

std::vector<float> RandomQuery(uint32_t rows, uint32_t query_heads, uint32_t head_dim,
                               std::mt19937_64& random) {
  std::normal_distribution<float> normal;
  std::vector<float> q(size_t{rows} * query_heads * head_dim);
  std::ranges::generate(q, [&] { return normal(random); });
  return q;
}

Output RunNaive(const PagedCase& test, const Batch& batch, uint32_t layer,
                const std::vector<float>& q) {
  Output output = Unwritten(test.rows(), batch.query_heads, test.shape().head_dim);
  NaiveAttention(test.view(), layer, batch, q, output.out, output.lse);
  return output;
}

Output RunPaged(const PagedCase& test, const Batch& batch, uint32_t layer,
                const std::vector<float>& q) {
  Output output = Unwritten(test.rows(), batch.query_heads, test.shape().head_dim);
  PagedAttention(test.view(), layer, batch, q, output.out, output.lse);
  return output;
}

Output RunRelay(const PagedCase& test, const Batch& batch, const RelayConfig& config,
                uint32_t layer, const std::vector<float>& q) {
  Output output = Unwritten(test.rows(), batch.query_heads, test.shape().head_dim);
  const RelayMetadata metadata = PlanRelay(batch, config);
  RelayAttention(test.view(), layer, batch, metadata, q, output.out, output.lse);
  return output;
}

void ExpectNear(const Output& want, const Output& got, float tolerance) {
  const auto compare = [tolerance](const std::vector<float>& a, const std::vector<float>& b,
                                   const char* what) {
    ASSERT_EQ(a.size(), b.size());
    for (size_t i = 0; i < a.size(); ++i) {
      const bool equal = a[i] == b[i];
      const bool near = std::fabs(a[i] - b[i]) <= tolerance * std::max(1.0F, std::fabs(a[i]));
      ASSERT_TRUE(equal || near) << what << "[" << i << "]: want " << a[i] << ", got " << b[i];
    }
  };
  compare(want.out, got.out, "out");
  compare(want.lse, got.lse, "lse");
}

void ExpectSameBits(const Output& want, const Output& got) {
  const auto compare = [](const std::vector<float>& a, const std::vector<float>& b,
                          const char* what) {
    ASSERT_EQ(a.size(), b.size());
    for (size_t i = 0; i < a.size(); ++i) {
      ASSERT_EQ(std::bit_cast<uint32_t>(a[i]), std::bit_cast<uint32_t>(b[i]))
          << what << "[" << i << "]: want " << a[i] << ", got " << b[i];
    }
  };
  compare(want.out, got.out, "out");
  compare(want.lse, got.lse, "lse");
}

Output ExpectSameBitsOnThreads(const std::function<Output()>& run) {
  const int before = Parallelism();
  SetParallelism(1);
  Output one = run();
  for (const int threads : {2, 3, 5, 8}) {
    SCOPED_TRACE(threads);
    SetParallelism(threads);
    ExpectSameBits(one, run());
  }
  SetParallelism(before);
  return one;
}

}  // namespace kvrelay::attention
