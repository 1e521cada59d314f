// Virtual KV caches on sparse files, as tests make them.
#pragma once

#include <gtest/gtest.h>

#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "kvcache/sparse_memory.h"
#include "kvcache/virtual_kv_cache.h"

namespace kvrelay::testing_support {

constexpr uint64_t kRowPage = 1 << 16;

struct VirtualScene {
  std::vector<std::shared_ptr<SparseMemory>> memory;  // by rank
  std::shared_ptr<VirtualKvCache> cache;

  uint64_t resident() const {
    uint64_t bytes = 0;
    for (const auto& rank : memory) bytes += rank->resident_bytes();
    return bytes;
  }
  std::byte* At(uint32_t row, uint32_t token, uint32_t range = 0, uint32_t rank = 0) const {
    const VirtualLayout& layout = cache->layout(rank);
    return memory[rank]->data() + layout.FirstPage(range, row) * layout.page_bytes +
           token * layout.kv.token_stride;
  }
};

// 1024 bytes a token in each range: 64 tokens fill a page.
inline VirtualKvShape RowsOf(uint32_t rows, uint32_t max_seq_len, bool megacache) {
  return {.num_layers = 2,
          .num_kv_heads = 2,
          .head_size = megacache ? 32U : 128U,
          .max_batch_size = rows,
          .max_seq_len = max_seq_len,
          .dtype = DType::kFp32,
          .page_size = kRowPage,
          .block_size = 16,
          .megacache = megacache};
}

inline VirtualScene MakeVirtual(const std::vector<VirtualKvShape>& shapes, uint64_t pool_bytes,
                                const std::string& name) {
  VirtualScene scene;
  const auto layouts = VirtualLayout::Make(shapes).value();
  std::vector<VirtualKvCache::Rank> ranks;
  for (const VirtualLayout& layout : layouts) {
    scene.memory.push_back(SparseMemory::Create(layout.bytes(), layout.page_bytes, name).value());
    ranks.push_back({layout, scene.memory.back()});
  }
  scene.cache = VirtualKvCache::Create(std::move(ranks)).value();
  const Status reserved = scene.cache->ReservePhysicalPages(pool_bytes);
  EXPECT_TRUE(reserved.ok()) << reserved.ToString();
  return scene;
}

// One range, rows of 16 pages.
inline VirtualScene SmallCache(uint64_t pool_pages, const std::string& name, uint32_t rows = 4) {
  return MakeVirtual({RowsOf(rows, 1024, true)}, pool_pages * kRowPage, name);
}

}  // namespace kvrelay::testing_support
