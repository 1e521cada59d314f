// Engines whose caches have little in common pull from each other over real sockets and transports:
// shards, kinds of layers with blocks of their own, windows, block sizes, layouts, and memory of
// the host or of a device, which nobody but the device touches. Every element that comes is the one
// that was sent, and nothing else is written.
#include <gtest/gtest.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstring>
#include <numeric>
#include <random>
#include <thread>

#include "kvcache/convert.h"
#include "tests/agent/engine_fixture.h"
#include "tests/common/fake_device.h"

namespace kvrelay::agent {
namespace {

constexpr uint32_t kBlocksOfAKind = 96;
constexpr uint32_t kHeadDim = 4;

// A model of 6 layers; those at odd places have other heads, and with `window` keep only that many
// tokens.
struct Model {
  uint32_t layers = 6;
  uint32_t heads[2] = {4, 2};
  bool two_kinds = false;
  uint32_t window = 0;

  uint32_t kind_of(uint32_t layer) const { return two_kinds ? layer % 2 : 0; }
};

enum class Scales : uint8_t { kNone, kPerTensor, kPerHead };  // that come with the request

struct Shape {
  uint32_t tp = 1;
  std::vector<uint32_t> stages = {6};  // layers of each
  uint32_t block_size[2] = {16, 16};   // by kind
  KvFormat format = KvFormat::kNhd;
  DType dtype = DType::kFp32;
  Scales scales = Scales::kNone;
};

// A power of two: products are exact.
float Scale(Scales scales, uint32_t layer, bool v, uint32_t head) {
  if (scales == Scales::kNone) return 1;
  const uint32_t of = layer * 2 + (v ? 1 : 0) + (scales == Scales::kPerHead ? head * 3 : 0);
  return std::ldexp(1.0F, static_cast<int>(of % 7) - 3);
}

// The number that belongs there, as its owner has stored it.
float Value(uint32_t layer, bool v, uint32_t head, uint32_t token, uint32_t dim) {
  uint32_t mix = ((layer * 2 + (v ? 1 : 0)) * 16 + head) * 4096 + token;
  mix = (mix * 4 + dim) * 2654435761U;
  return static_cast<float>(mix >> 25);  // 0 to 127: exact in every dtype
}

// One rank's cache: a region for each kind of layers.
struct Rank {
  Rank(const Model& model, const Shape& shape, uint32_t layer_begin, uint32_t layer_count,
       uint32_t tp_rank, Device* device) {
    shard = KvShard::Make(model.layers, model.heads[0], shape.tp, tp_rank).value();
    shard.layer_begin = layer_begin;
    shard.layer_count = layer_count;
    if (model.two_kinds) shard.more_heads = {KvHeads::Split(model.heads[1], shape.tp, tp_rank)};
    layout = DenseOf(model, shape, 0);
    layout.scales.with_request = shape.scales != Scales::kNone;
    layout.scales.per_head = shape.scales == Scales::kPerHead;
    if (model.two_kinds) {
      const KvLayout other = DenseOf(model, shape, 1);
      KvKind kind = other.kind(0);
      kind.head_group = 1;
      kind.window = model.window;
      layout.more_kinds = {kind};
      std::vector<TensorPlace> k;
      std::vector<TensorPlace> v;
      uint32_t next[2] = {0, 0};
      for (uint32_t layer = shard.layer_begin; layer < shard.layer_end(); ++layer) {
        const uint32_t index = model.kind_of(layer);
        const KvLayout& from = index == 0 ? layout : other;
        const uint32_t place = next[index]++;
        k.push_back({index, from.k[place].offset});
        v.push_back({index, from.v[place].offset});
        layout.layer_kinds.push_back(index);
      }
      layout.k = k;
      layout.v = v;
    }
    const uint64_t bytes[2] = {DenseOf(model, shape, 0).dense_bytes(),
                               DenseOf(model, shape, 1).dense_bytes()};
    for (uint32_t i = 0; i < (model.two_kinds ? 2U : 1U); ++i) {
      Result<Region> region = device == nullptr ? Region::AllocateHost(bytes[i], "test")
                                                : device->Allocate(bytes[i], "test");
      regions.push_back(std::make_unique<Region>(std::move(region).value()));
      std::memset(regions.back()->data(), 0x55, bytes[i]);
    }
  }

  // Of as many layers as there are at all, so that places suffice.
  KvLayout DenseOf(const Model& model, const Shape& shape, uint32_t kind) const {
    const uint32_t heads = kind == 0
                               ? shard.head_count
                               : KvHeads::Split(model.heads[1], shape.tp, shard.tp_rank).count;
    return KvLayout::Dense(shape.format, shape.dtype, shard.layer_count, heads, kHeadDim,
                           shape.block_size[kind], kBlocksOfAKind);
  }
  // A request's, of `scales`.
  KvScales RequestScales(const Model& model, Scales scales) const {
    KvScales all;
    if (scales == Scales::kNone) return all;
    all.per_head = layout.scales.per_head;
    for (uint32_t layer = shard.layer_begin; layer < shard.layer_end(); ++layer) {
      const KvHeads heads = shard.heads(model.kind_of(layer));
      const uint32_t end = all.per_head ? heads.end() : heads.begin + 1;
      for (uint32_t head = heads.begin; head < end; ++head) {
        all.k.push_back(Scale(scales, layer, false, head));
        all.v.push_back(Scale(scales, layer, true, head));
      }
    }
    return all;
  }
  std::byte* At(uint32_t layer, bool v, BlockId block, uint32_t head, uint32_t token) const {
    const KvKind kind = layout.kind(layout.kind_of(layer - shard.layer_begin));
    const TensorPlace& place = (v ? layout.v : layout.k)[layer - shard.layer_begin];
    return regions[place.region]->data() + place.offset + block * kind.block_stride +
           (head - shard.heads(kind.head_group).begin) * kind.head_stride +
           token * kind.token_stride;
  }

  KvShard shard;
  KvLayout layout;
  std::vector<std::unique_ptr<Region>> regions;
};

// How bytes get from owner to reader, and whose memory is a device's.
struct Way {
  std::string name;
  std::string transport;
  bool owner_device = false;
  bool reader_device = false;
};
const std::vector<Way>& Ways() {
  static const std::vector<Way> ways = {
      {"Mapped", "mapped", false, false},        {"UcxPacked", "ucx-packed", false, false},
      {"MappedOnADevice", "mapped", true, true}, {"UcxPackedOnADevice", "ucx-packed", true, true},
      {"HostToDevice", "auto", false, true},     {"DeviceToHost", "auto", true, false}};
  return ways;
}

// One engine's agents over its ranks.
class Side : public TestEngine {
 public:
  Side(const Model& model, const Shape& shape, const std::string& transport, bool on_device,
       const std::string& run_dir)
      : TestEngine(kBlocksOfAKind), model(model), shape(shape) {
    if (on_device) device = std::make_shared<tests::FakeDevice>();
    std::vector<RankCache> caches;
    uint32_t begin = 0;
    for (const uint32_t count : shape.stages) {
      for (uint32_t tp_rank = 0; tp_rank < shape.tp; ++tp_rank) {
        ranks.emplace_back(model, shape, begin, count, tp_rank, device.get());
      }
      begin += count;
    }
    for (const Rank& rank : ranks) {
      RankCache cache{rank.layout, rank.shard, {}, device};
      for (const auto& region : rank.regions) cache.regions.push_back(region.get());
      caches.push_back(std::move(cache));
    }
    EngineAgentOptions options;
    options.block_size = shape.block_size[0];
    options.transport = transport;
    options.run_dir = run_dir;
    options.chunk_bytes = 1024;  // many chunks of little data
    Start(std::move(options), caches);
  }
  ~Side() { Stop(); }

  // Whether this test looks at the KV, or leaves it to its device.
  void Touch(bool may) const {
    if (device != nullptr) device->LetHostTouch(may);
  }

  // Blocks for tokens [first, end), in windows from `window_from` on.
  HeldTables Take(uint32_t first, uint32_t end, uint32_t window_from) {
    HeldTables held;
    for (uint32_t kind = 0; kind < (model.two_kinds ? 2U : 1U); ++kind) {
      const uint32_t size = shape.block_size[kind];
      const uint32_t from = kind == 1 && model.window > 0 ? std::max(first, window_from) : first;
      const uint32_t begin = from / size * size;
      // Not in the pool's order, and with gaps.
      BlockTable blocks = pools[kind]->Allocate((end - begin + size - 1) / size).value();
      BlockTable shuffled;
      std::vector<size_t> order(blocks.size());
      std::iota(order.begin(), order.end(), 0);
      std::shuffle(order.begin(), order.end(), std::mt19937(17));
      for (const size_t i : order) shuffled.Append(blocks.Share(i, 1));
      held.Add(std::move(shuffled), begin, kind == 1 && model.window > 0 ? window_from : 0);
    }
    return held;
  }

  // Calls visit(address of the element, number that belongs there) for each element of
  // [first, end); the number is one of an owner with `scales` when ours do not say what it means.
  template <typename Visit>
  void ForEach(const std::vector<KvTable>& tables, uint32_t first, uint32_t end, Scales scales,
               Visit visit) const {
    for (const Rank& rank : ranks) {
      for (uint32_t layer = rank.shard.layer_begin; layer < rank.shard.layer_end(); ++layer) {
        const uint32_t kind = model.kind_of(layer);
        const KvTable& table = tables[kind];
        const KvHeads heads = rank.shard.heads(kind);
        const uint32_t size = shape.block_size[kind];
        for (uint32_t token = std::max(first, table.held_from); token < end; ++token) {
          const BlockId block = table.blocks[(token - table.first_token) / size];
          for (uint32_t head = heads.begin; head < heads.end(); ++head) {
            for (const bool v : {false, true}) {
              std::byte* row = rank.At(layer, v, block, head, token % size);
              const float scale =
                  shape.scales == Scales::kNone ? Scale(scales, layer, v, head) : 1.0F;
              for (uint32_t dim = 0; dim < kHeadDim; ++dim) {
                visit(row + dim * SizeOf(shape.dtype), Value(layer, v, head, token, dim) * scale);
              }
            }
          }
        }
      }
    }
  }

  const Model model;
  const Shape shape;
  std::shared_ptr<tests::FakeDevice> device;  // null: host memory
  std::shared_ptr<BlockPool> pools[2] = {pool, BlockPool::Create(kBlocksOfAKind)};
  std::vector<Rank> ranks;
};

void Store(DType dtype, float value, std::byte* to) {
  ConvertRun(DType::kFp32, reinterpret_cast<const std::byte*>(&value), dtype, to, 1, 1);
}

class AnyLayout : public testing::TestWithParam<Way> {
 protected:
  Side Owner(const Model& model, const Shape& shape) const {
    return {model, shape, GetParam().transport, GetParam().owner_device, folder_.path()};
  }
  Side Reader(const Model& model, const Shape& shape) const {
    return {model, shape, GetParam().transport, GetParam().reader_device, folder_.path()};
  }
  // Tokens [first, end) from the one to the other, followed while their progress comes.
  void Check(const Model& model, const Shape& of_owner, const Shape& of_reader, uint32_t first,
             uint32_t end) {
    Side owner = Owner(model, of_owner);
    Side reader = Reader(model, of_reader);
    const uint32_t window_from = model.window > 0 && end > model.window ? end - model.window : 0;
    HeldTables blocks = owner.Take(first, end, window_from);
    owner.ForEach(blocks.tables(), first, end, of_owner.scales,
                  [&](std::byte* at, float value) { Store(of_owner.dtype, value, at); });
    owner.Touch(false);
    reader.Touch(false);
    OfferRequest offer;
    offer.blocks = std::move(blocks);
    offer.first_token = first;
    offer.tokens = end - first;
    for (const Rank& rank : owner.ranks) {
      offer.scales.push_back(rank.RequestScales(model, of_owner.scales));
    }
    const proto::Ticket ticket = owner.Offer(std::move(offer));
    std::vector<std::shared_ptr<ProgressWriter>> writers;
    for (uint32_t rank = 0; rank < owner.agent->num_ranks(); ++rank) {
      writers.push_back(owner.agent->Writer(rank, ticket.prompt.lease));
    }

    HeldTables own =
        reader.Take(first / of_reader.block_size[0] * of_reader.block_size[0], end, window_from);
    const std::vector<KvTable> tables = own.tables();
    reader.StartLoad(ticket, std::move(own));
    // The KV is there; that it is comes in pieces.
    const auto publish = [&](const Progress& progress) {
      for (const auto& writer : writers) writer->Publish(progress);
      std::this_thread::sleep_for(std::chrono::microseconds(300));
    };
    for (uint32_t done = first; done < end; done = std::min(end, done + 19)) {
      publish({done, std::min(end, done + 19), 1});
    }
    publish({end, end, 0});
    auto done = reader.WaitFor([](const auto& finished) { return !finished.drained.empty(); });
    ASSERT_EQ(done.loads.size(), 1U);
    ASSERT_TRUE(done.loads[0].second.has_value()) << done.loads[0].second.error().ToString();

    const std::vector<KvScales>& scales = done.loads[0].second->own.scales;
    ASSERT_EQ(scales.size(), reader.ranks.size());
    for (size_t rank = 0; rank < scales.size(); ++rank) {
      const Scales taken = of_reader.scales == Scales::kNone ? Scales::kNone : of_owner.scales;
      EXPECT_EQ(scales[rank], reader.ranks[rank].RequestScales(model, taken)) << "rank " << rank;
    }

    const bool scales_go = of_owner.scales != Scales::kNone && of_reader.scales == Scales::kNone;
    EXPECT_EQ(done.loads[0].second->cast, of_owner.dtype != of_reader.dtype || scales_go);

    reader.Touch(true);
    // Everything that came is right. Set back to the pattern, nothing else is left.
    uint64_t wrong = 0;
    reader.ForEach(tables, first, end, of_owner.scales, [&](std::byte* at, float value) {
      std::byte want[4];
      Store(of_reader.dtype, value, want);
      if (std::memcmp(at, want, SizeOf(of_reader.dtype)) != 0) ++wrong;
      std::memset(at, 0x55, SizeOf(of_reader.dtype));
    });
    EXPECT_EQ(wrong, 0U) << "elements are not what was sent";
    for (const Rank& rank : reader.ranks) {
      for (const auto& region : rank.regions) {
        EXPECT_EQ(std::count_if(region->data(), region->data() + region->bytes(),
                                [](std::byte byte) { return byte != std::byte{0x55}; }),
                  0)
            << "bytes were written that nobody asked for";
      }
    }
  }

  const tests::TempDir folder_;
};

TEST_P(AnyLayout, BlocksThatAreNoMultiplesOfEachOther) {
  Check({}, {.block_size = {24, 0}}, {.block_size = {100, 0}, .format = KvFormat::kHnd}, 0, 333);
}

TEST_P(AnyLayout, ALeaseThatBeginsInsideABlockOfEitherSide) {
  Check({}, {.block_size = {64, 0}}, {.block_size = {8, 0}}, 88, 333);
  Check({}, {.block_size = {8, 0}}, {.block_size = {64, 0}}, 77, 333);
}

TEST_P(AnyLayout, CastsOnTheWay) {
  Check({}, {.dtype = DType::kBf16}, {.block_size = {7, 0}, .dtype = DType::kFp32}, 0, 120);
  Check({}, {.dtype = DType::kFp32}, {.block_size = {32, 0}, .dtype = DType::kFp16}, 16, 120);
}

TEST_P(AnyLayout, ScalesThatComeWithTheRequest) {
  // The reader takes them with the numbers, as they are.
  Check({}, {.tp = 2, .dtype = DType::kInt8, .scales = Scales::kPerHead},
        {.stages = {2, 4},
         .block_size = {24, 0},
         .format = KvFormat::kHnd,
         .dtype = DType::kInt8,
         .scales = Scales::kPerHead},
        0, 150);
  Check({.two_kinds = true},
        {.block_size = {16, 40}, .dtype = DType::kInt8, .scales = Scales::kPerTensor},
        {.tp = 2, .block_size = {24, 8}, .dtype = DType::kInt8, .scales = Scales::kPerTensor}, 0,
        150);
  // Or wants what the numbers mean.
  Check({}, {.dtype = DType::kInt8, .scales = Scales::kPerHead},
        {.tp = 4, .block_size = {7, 0}, .dtype = DType::kFp32}, 0, 150);
  Check({}, {.dtype = DType::kFp32, .scales = Scales::kPerHead}, {.dtype = DType::kFp32}, 0, 150);
  Check({}, {.tp = 2, .dtype = DType::kInt8, .scales = Scales::kPerTensor}, {.dtype = DType::kFp16},
        0, 150);
}

TEST_P(AnyLayout, AnOfferWithoutTheScalesThatItsCacheNeedsIsRefused) {
  Side owner = Owner({}, {.tp = 2, .dtype = DType::kInt8, .scales = Scales::kPerHead});
  const auto refusal = [&](std::vector<KvScales> scales) {
    OfferRequest offer;
    offer.blocks = owner.Take(0, 20, 0);
    offer.tokens = 20;
    offer.scales = std::move(scales);
    owner.connector->Offer(std::move(offer));
    auto offers = owner.WaitFor([](const auto& done) { return !done.offers.empty(); }).offers;
    const auto& outcome = offers.at(0).second;
    return outcome.has_value() ? "it is offered" : outcome.error().ToString();
  };
  const auto of = [&](size_t rank) {
    return owner.ranks[rank].RequestScales({}, Scales::kPerHead);
  };
  EXPECT_EQ(refusal({of(0), of(1)}), "it is offered");
  EXPECT_NE(refusal({}).find("own rank 0: "), std::string::npos) << refusal({});
  EXPECT_NE(refusal({of(0)}).find("scales of 1 ranks, there are 2"), std::string::npos);
  KvScales few = of(1);
  few.v.pop_back();
  EXPECT_NE(refusal({of(0), few}).find("own rank 1: "), std::string::npos) << refusal({of(0), few});
}

TEST_P(AnyLayout, StagesThatCutTheModelDifferently) {
  Check({}, {.tp = 2, .stages = {1, 4, 1}}, {.stages = {3, 3}, .format = KvFormat::kHnd}, 0, 150);
  Check({}, {.stages = {2, 2, 2}}, {.tp = 4, .stages = {5, 1}, .block_size = {48, 0}}, 0, 150);
}

TEST_P(AnyLayout, KindsOfLayersWithBlocksOfTheirOwn) {
  Check({.two_kinds = true}, {.block_size = {16, 40}}, {.block_size = {24, 8}}, 0, 250);
}

TEST_P(AnyLayout, LayersThatKeepAWindow) {
  Check({.two_kinds = true, .window = 50}, {.block_size = {16, 40}}, {.block_size = {24, 8}}, 0,
        250);
  Check({.two_kinds = true, .window = 500}, {.block_size = {16, 40}}, {.block_size = {24, 8}}, 0,
        250);
}

TEST_P(AnyLayout, AllOfItTogether) {
  Check({.two_kinds = true, .window = 50},
        {.tp = 4, .stages = {2, 4}, .block_size = {24, 10}, .format = KvFormat::kHnd},
        {.tp = 2, .stages = {1, 3, 2}, .block_size = {100, 16}, .dtype = DType::kBf16}, 100, 390);
}

TEST_P(AnyLayout, AnotherModelIsRefusedWithBothSidesValues) {
  Model other;
  other.heads[0] = 8;
  Side owner = Owner({}, {});
  Side reader = Reader(other, {});
  OfferRequest offer;
  offer.blocks = owner.Take(0, 20, 0);
  offer.tokens = 20;
  reader.StartLoad(owner.Offer(std::move(offer)), reader.Take(0, 20, 0));
  auto done = reader.WaitFor([](const auto& finished) { return !finished.drained.empty(); });
  const Status refusal = done.loads.at(0).second.error();
  EXPECT_EQ(refusal.code(), Code::kIncompatible);
  for (const char* value : {"of 4", "of 8"}) {
    EXPECT_NE(refusal.message().find(value), std::string::npos) << refusal.ToString();
  }
}

INSTANTIATE_TEST_SUITE_P(Transports, AnyLayout, testing::ValuesIn(Ways()),
                         [](const auto& way) { return way.param.name; });

}  // namespace
}  // namespace kvrelay::agent
