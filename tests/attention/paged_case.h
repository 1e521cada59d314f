// A paged cache with random contents for tests, and random sequences over it. Whatever no sequence
// wrote is NaN (where the type has one): slots past a sequence's end, blocks of nobody, gaps
// between rows.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <functional>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "attention/attention.h"
#include "kvcache/kv_view.h"

namespace kvrelay::attention {

// The seed of a randomised test: KVRELAY_SEED, or a fixed one. Tests put it in their trace.
inline uint64_t Seed() {
  const char* text = std::getenv("KVRELAY_SEED");
  return text != nullptr ? std::strtoull(text, nullptr, 10) : 20250611;
}

// What a batch multiplies its scores with: 1 / sqrt(head_dim).
inline float Scale(uint32_t head_dim) { return 1.0F / std::sqrt(static_cast<float>(head_dim)); }

struct CacheShape {
  DType dtype = DType::kFp32;
  KvFormat format = KvFormat::kNhd;
  uint32_t layers = 1;
  uint32_t kv_heads = 1;
  uint32_t head_dim = 64;
  uint32_t block_size = 16;
  uint32_t num_blocks = 64;
  uint32_t gap = 0;       // elements between rows that belong to nobody
  bool scaled = false;    // numbers have scales, random ones
  bool per_head = false;  // one for each KV head, else for each layer
  std::string ToString() const;
};

// Any type of a cache, any way to scale; random.
void DrawNumbers(CacheShape& shape, std::mt19937_64& random);

// Rounds to the cache's type.
void StoreElement(DType dtype, std::byte* row, uint32_t index, float value);

class PagedCase {
 public:
  PagedCase(const CacheShape& shape, uint64_t seed);
  PagedCase(const PagedCase&) = delete;
  PagedCase& operator=(const PagedCase&) = delete;

  std::mt19937_64& random() { return random_; }
  uint32_t Uniform(uint32_t low, uint32_t high) {
    return std::uniform_int_distribution<uint32_t>(low, high)(random_);
  }
  const KvView& view() const { return view_; }
  const CacheShape& shape() const { return shape_; }

  // Blocks that nobody has yet, in no order.
  std::vector<BlockId> TakeBlocks(uint32_t count);
  // Random K and V of the size of 1 in the first `tokens` slots of `blocks`, in all layers and
  // heads.
  void FillTokens(const std::vector<BlockId>& blocks, uint32_t tokens);
  // One element of one token's K row, in all layers.
  void SetK(const std::vector<BlockId>& blocks, uint32_t token, uint32_t head, uint32_t dim,
            float value);

  // A prefix of whole blocks, filled; behind all blocks of `parent`, which both then share.
  const std::vector<BlockId>& AddPrefix(uint32_t blocks,
                                        const std::vector<BlockId>* parent = nullptr);
  // A sequence of `context` tokens (the prefix's included) of which the last `rows` are new; its
  // rows follow those of the sequences before it.
  void AddSequence(uint32_t rows, uint32_t context, const std::vector<BlockId>* prefix = nullptr);
  const std::vector<Sequence>& sequences() const { return sequences_; }
  uint32_t rows() const { return rows_; }

 private:
  CacheShape shape_;
  std::mt19937_64 random_;
  std::vector<std::byte> k_memory_;
  std::vector<std::byte> v_memory_;
  KvView view_;
  std::vector<BlockId> free_;
  // Spans of sequences point into these: never moved.
  std::vector<std::unique_ptr<std::vector<BlockId>>> tables_;
  std::vector<Sequence> sequences_;
  uint32_t rows_ = 0;
};

struct Output {
  std::vector<float> out;
  std::vector<float> lse;
};
// Buffers of the batch's shape, full of NaN, so that a row that is not written shows.
Output Unwritten(uint32_t rows, uint32_t query_heads, uint32_t head_dim);
std::vector<float> RandomQuery(uint32_t rows, uint32_t query_heads, uint32_t head_dim,
                               std::mt19937_64& random);

Output RunNaive(const PagedCase& test, const Batch& batch, uint32_t layer,
                const std::vector<float>& q);
Output RunPaged(const PagedCase& test, const Batch& batch, uint32_t layer,
                const std::vector<float>& q);
Output RunRelay(const PagedCase& test, const Batch& batch, const RelayConfig& config,
                uint32_t layer, const std::vector<float>& q);

// Fails with the first differing element. NaN never passes; infinities must be equal.
void ExpectNear(const Output& want, const Output& got, float tolerance);
void ExpectSameBits(const Output& want, const Output& got);
// Runs it on one thread and on several; returns what all of them must give.
Output ExpectSameBitsOnThreads(const std::function<Output()>& run);

}  // namespace kvrelay::attention
