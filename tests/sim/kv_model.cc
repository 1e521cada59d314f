#include "tests/sim/kv_model.h"

#include <algorithm>
#include <cstring>

namespace kvrelay::sim {
namespace {

uint64_t Mix(uint64_t z) {
  z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9ULL;
  z = (z ^ (z >> 27)) * 0x94d049bb133111ebULL;
  return z ^ (z >> 31);
}

// Calls visit(word, expected) for every word of the part that this rank holds.
template <typename Visit>
void ForEachWord(RankMemory& memory, std::span<const BlockId> blocks, uint32_t table_first,
                 const ContentHash& part, uint32_t first, uint32_t count, Visit visit) {
  const KvShard& shard = memory.shard();
  for (uint32_t token = first; token < first + count; ++token) {
    const uint32_t at = token - table_first;
    for (uint32_t layer = 0; layer < kLayers; ++layer) {
      for (uint32_t head = shard.head_begin; head < shard.head_end(); ++head) {
        for (const bool v : {false, true}) {
          visit(*memory.WordAt(blocks[at / kBlockSize], at % kBlockSize, layer, v, head),
                Word(part, token, layer, v, head));
        }
      }
    }
  }
}

bool IsPrefix(const ContentHash& part) {
  static const std::vector<ContentHash> names = Prompt{.prefix = kBlocks}.prefix_names();
  return std::ranges::find(names, part) != names.end();
}

}  // namespace

ContentHash MakeHash(uint64_t content) {
  ContentHash hash;
  const uint64_t words[2] = {Mix(content + 1), Mix(content + 0x9e3779b97f4a7c15ULL)};
  std::memcpy(hash.bytes.data(), words, sizeof(words));
  return hash;
}

uint64_t Word(const ContentHash& part, uint32_t token, uint32_t layer, bool v, uint32_t head) {
  const ContentHash& content = IsPrefix(part) ? MakeHash(0) : part;
  uint64_t h = 0;
  std::memcpy(&h, content.bytes.data(), sizeof(h));
  return Mix(h + token * 64 + layer * 16 + (v ? 8 : 0) + head + 1);
}

RankMemory::RankMemory(uint32_t tp_size, uint32_t tp_rank, KvFormat format)
    : shard_(KvShard::Make(kLayers, kHeads, tp_size, tp_rank).value()),
      records_(std::make_unique<LeaseRecord[]>(kRecordSlots)) {
  layout_ = KvLayout::Dense(format, DType::kFp32, kLayers, shard_.head_count, kHeadDim, kBlockSize,
                            kBlocks);
  words_.resize(layout_.dense_bytes() / sizeof(uint64_t));
  view_ = std::make_unique<KvView>(
      layout_, std::vector<std::byte*>{reinterpret_cast<std::byte*>(words_.data())});
}

std::vector<transport::LocalRegion> RankMemory::regions() {
  return {{reinterpret_cast<std::byte*>(words_.data()), words_.size() * sizeof(uint64_t), -1},
          {reinterpret_cast<std::byte*>(records_.get()), kRecordSlots * sizeof(LeaseRecord), -1}};
}

uint64_t* RankMemory::WordAt(BlockId block, uint32_t token_in_block, uint32_t layer, bool v,
                             uint32_t global_head) {
  const uint32_t head = global_head - shard_.head_begin;
  return reinterpret_cast<uint64_t*>(v ? view_->V(layer, block, head, token_in_block)
                                       : view_->K(layer, block, head, token_in_block));
}

void WritePart(RankMemory& memory, std::span<const BlockId> blocks, uint32_t table_first,
               const ContentHash& part, uint32_t first, uint32_t count) {
  ForEachWord(memory, blocks, table_first, part, first, count,
              [](uint64_t& word, uint64_t expected) { word = expected; });
}

bool CheckPart(RankMemory& memory, std::span<const BlockId> blocks, uint32_t table_first,
               const ContentHash& part, uint32_t first, uint32_t count) {
  bool right = true;
  ForEachWord(memory, blocks, table_first, part, first, count,
              [&right](uint64_t& word, uint64_t expected) { right = right && word == expected; });
  return right;
}

}  // namespace kvrelay::sim
