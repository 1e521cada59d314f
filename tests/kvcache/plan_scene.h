// The engines of a planner's case: layouts, shards, block tables, and memory with known content.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <map>
#include <vector>

#include "kvcache/plan_pull.h"
#include "tests/kvcache/plan_case.h"

namespace kvrelay::testing_support {

// What memory holds where nothing was written.
inline constexpr std::byte kUntouched{0xa5};

// One tensor row element or page byte in the model's coordinates: layers and heads are global.
struct Coordinates {
  uint32_t layer = 0;
  bool v = false;
  uint32_t head = 0;
  uint32_t token = 0;  // or page
};

// One rank's cache in ordinary memory.
struct Cache {
  KvLayout layout;
  KvShard shard;
  KvScales request_scales;  // instead of the layout's
  bool uses_request_scales = false;
  std::vector<std::vector<std::byte>> regions;
  std::vector<std::vector<BlockId>> blocks;  // by kind
  std::vector<TableView> tables;

  PullSide Side() const {
    return {layout, shard, {}, tables, uses_request_scales ? &request_scales : nullptr};
  }
  std::vector<uint64_t> RegionBytes() const {
    std::vector<uint64_t> bytes;
    for (const auto& region : regions) bytes.push_back(region.size());
    return bytes;
  }
  template <typename Byte>
  std::vector<Byte*> Bases() {
    std::vector<Byte*> bases;
    for (auto& region : regions) bases.push_back(region.data());
    return bases;
  }
  // The address formula.
  std::byte* At(const Coordinates& c);
  float Scale(const Coordinates& c) const;
};

// The numbers of a case, cut to what goes together, and its engines.
class PlanScene {
 public:
  explicit PlanScene(PlanCase c);

  const PlanCase& numbers() const { return c_; }
  TokenRange tokens() const { return tokens_; }  // pulled
  const KvShard& reader() const { return reader_; }
  const std::vector<KvShard>& owners() const { return owners_; }

  // The reader's rank, untouched. Copies of it keep looking at its block tables.
  Cache MakeReader() { return MakeCache(reader_, false, c_.reader_layout); }
  // A rank of the owner, with all that the reader needs of it in place.
  Cache& Owner(uint32_t index);
  // What a right pull leaves in an untouched cache of the reader, one element at a time.
  void WriteExpected(Cache& expected) const;

 private:
  // A kind of layers on one side.
  struct KindDims {
    uint32_t head_group = 0;
    uint32_t window = 0;
    uint32_t block = 1;
  };

  uint32_t KindOf(uint32_t layer) const { return two_kinds_ ? c_.kinds >> layer & 1 : 0; }
  KvShard Shard(uint32_t tp, uint32_t rank, uint32_t layer_begin, uint32_t layer_end) const;
  Cache MakeCache(const KvShard& shard, bool is_owner, uint64_t layout_seed);
  void PlaceKind(Cache& cache, uint32_t kind, bool is_owner, Random& random, uint64_t layout_seed);
  void AddScales(Cache& cache, uint32_t way) const;
  TokenRange Needed(uint32_t kind) const;
  void FillOwner(Cache& owner) const;
  template <typename Fn>
  void ForEachRow(const Cache& cache, Fn&& fn) const;

  PlanCase c_;
  bool two_kinds_ = false;
  bool two_groups_ = false;
  std::array<KindDims, 2> owner_kinds_;
  std::array<KindDims, 2> reader_kinds_;
  std::array<uint32_t, 2> owner_held_{};
  std::array<uint32_t, 2> reader_held_{};
  TokenRange tokens_;
  DType owner_type_ = DType::kBf16;
  DType reader_type_ = DType::kBf16;
  std::vector<KvShard> owners_;
  KvShard reader_;
  std::map<uint32_t, Cache> owner_caches_;
};

}  // namespace kvrelay::testing_support
