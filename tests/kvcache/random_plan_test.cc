// Plans carried out, against the address formula one row at a time: random models, shards on both
// sides, layouts, tables and token ranges.
#include <gtest/gtest.h>

#include <algorithm>

#include "kvcache/copy_host.h"
#include "kvcache/plan_pull.h"
#include "kvcache/stream_chunks.h"
#include "tests/kvcache/test_cache.h"

namespace kvrelay {
namespace {

using testing_support::LayoutDims;
using testing_support::Pick;
using testing_support::Random;
using testing_support::RandomLayout;
using testing_support::RandomTable;
using testing_support::TestCache;
using testing_support::TestSeed;
using testing_support::TrueByte;

uint32_t RandomTp(Random& random, uint32_t heads) {
  while (true) {
    const uint32_t tp = Pick(random, 1, 8);
    if (heads % tp == 0 || tp % heads == 0) return tp;
  }
}

// One model, an owner engine with all its ranks, and one rank of a reader engine.
struct Scene {
  LayoutDims dims;
  uint32_t layers = 0;
  uint32_t heads = 0;
  std::vector<KvShard> owners;
  KvShard reader;
  TokenRange tokens;
  uint32_t owner_first = 0;
  uint32_t reader_first = 0;
};

Scene RandomScene(Random& random) {
  Scene s;
  s.dims.mla = Pick(random, 0, 5) == 0;
  s.dims.dtype = static_cast<DType>(Pick(random, 0, 2));
  s.dims.head_dim = Pick(random, 0, 3) == 0 ? 32 : Pick(random, 1, 24);
  s.dims.block_size = Pick(random, 1, 6);
  s.layers = Pick(random, 1, 3);
  s.heads = s.dims.mla ? 1 : Pick(random, 1, 4);

  const uint32_t owner_tp = RandomTp(random, s.heads);
  const uint32_t stage = Pick(random, 1, s.layers);  // layers of a pipeline stage of the owner
  for (uint32_t begin = 0; begin < s.layers; begin += stage) {
    for (uint32_t rank = 0; rank < owner_tp; ++rank) {
      KvShard shard = KvShard::Make(s.layers, s.heads, owner_tp, rank).value();
      shard.layer_begin = begin;
      shard.layer_count = std::min(stage, s.layers - begin);
      s.owners.push_back(shard);
    }
  }
  const uint32_t reader_tp = RandomTp(random, s.heads);
  s.reader = KvShard::Make(s.layers, s.heads, reader_tp, Pick(random, 0, reader_tp - 1)).value();
  s.reader.layer_begin = Pick(random, 0, s.layers - 1);
  s.reader.layer_count = Pick(random, 1, s.layers - s.reader.layer_begin);

  const uint32_t block = s.dims.block_size;
  s.tokens.begin = Pick(random, 0, 3 * block);
  s.tokens.end = s.tokens.begin + Pick(random, 1, 4 * block);
  s.owner_first = Pick(random, 0, s.tokens.begin / block) * block;
  s.reader_first = Pick(random, 0, s.tokens.begin / block) * block;
  const uint32_t first = std::min(s.owner_first, s.reader_first);
  s.dims.num_blocks = (s.tokens.end - first + block - 1) / block + Pick(random, 0, 3);
  return s;
}

constexpr std::byte kUntouched{0xa5};

TestCache RandomCache(Random& random, const Scene& scene, const KvShard& shard) {
  std::vector<uint64_t> region_bytes;
  KvLayout layout = RandomLayout(random, scene.dims, shard, region_bytes);
  EXPECT_TRUE(layout.Validate(region_bytes).ok()) << layout.Validate(region_bytes).ToString();
  return TestCache(std::move(layout), shard, kUntouched);
}

void Pull(const TestCache& owner, TableView owner_table, TestCache& reader, TableView reader_table,
          const PullSource& source, TokenRange tokens) {
  const auto plan = PlanPull(owner.Side(owner_table), reader.Side(reader_table), source.head_begin,
                             source.head_end, tokens);
  ASSERT_TRUE(plan.has_value()) << plan.error().ToString();
  const Status valid = plan->Validate(owner.RegionBytes(), reader.RegionBytes());
  ASSERT_TRUE(valid.ok()) << valid.ToString();
  const auto src = owner.ConstBases();
  const auto dst = reader.Bases();
  ExecuteCopy(*plan, src, dst);
}

// The bytes of one segment of the canonical stream, by its definition.
void AppendTrueSegment(const StreamShape& shape, TokenRange tokens,
                       std::vector<std::byte>& stream) {
  for (const uint32_t layer : shape.layers) {
    for (const bool v : {false, true}) {
      if (v && !shape.has_v) continue;
      for (uint32_t head = shape.head_begin; head < shape.head_end; ++head) {
        for (uint32_t token = tokens.begin; token < tokens.end; ++token) {
          for (uint64_t byte = 0; byte < shape.row_bytes(); ++byte) {
            stream.push_back(TrueByte(layer, v, head, token, byte));
          }
        }
      }
    }
  }
}

// Of all segments, `segment` tokens each.
std::vector<std::byte> TrueStream(const StreamShape& shape, uint32_t segment) {
  std::vector<std::byte> stream;
  for (uint32_t begin = shape.tokens.begin; begin < shape.tokens.end; begin += segment) {
    AppendTrueSegment(shape, {begin, std::min(begin + segment, shape.tokens.end)}, stream);
  }
  return stream;
}

void PullPacked(Random& random, const TestCache& owner, TableView owner_table, TestCache& reader,
                TableView reader_table, const PullSource& source, TokenRange tokens) {
  const auto shapes =
      StreamsOf(owner.Side(owner_table), reader.Side(reader_table), source, tokens).value();
  ASSERT_EQ(shapes.size(), 1U);
  StreamShape shape = shapes[0];
  if (Pick(random, 0, 1) == 1) shape.segment_tokens = Pick(random, 1, shape.tokens.size());
  const auto most = static_cast<uint32_t>(std::min<uint64_t>(shape.bytes() + 8, 1U << 14));
  const auto least = static_cast<uint32_t>(std::max<uint64_t>(shape.row_bytes(), most / 8));
  const uint32_t chunk_bytes = Pick(random, least, std::max(least, most));
  const auto chunks = StreamChunks::Make(shape, chunk_bytes).value();
  const uint32_t wanted = shape.segment_tokens > 0 ? shape.segment_tokens : shape.tokens.size();
  const std::vector<std::byte> truth =
      TrueStream(shape, std::min(wanted, static_cast<uint32_t>(chunk_bytes / shape.row_bytes())));
  uint64_t at = 0;
  for (uint32_t i = 0; i < chunks.count(); ++i) {
    std::vector<std::byte> chunk(chunks.bytes(i), kUntouched);
    const std::vector<uint64_t> length = {chunk.size()};
    const auto pack = chunks.PlanPack(owner.Side(owner_table), i);
    ASSERT_TRUE(pack.has_value()) << pack.error().ToString();
    ASSERT_TRUE(pack->Validate(owner.RegionBytes(), length).ok());
    std::byte* const to_chunk[] = {chunk.data()};
    ExecuteCopy(*pack, owner.ConstBases(), to_chunk);
    ASSERT_LE(at + chunk.size(), truth.size());
    ASSERT_TRUE(std::equal(chunk.begin(), chunk.end(), truth.begin() + static_cast<int64_t>(at)))
        << "chunk " << i << " of " << chunks.count();
    at += chunk.size();

    const auto unpack = chunks.PlanUnpack(reader.Side(reader_table), i);
    ASSERT_TRUE(unpack.has_value()) << unpack.error().ToString();
    ASSERT_TRUE(unpack->Validate(length, reader.RegionBytes()).ok());
    const std::byte* const from_chunk[] = {chunk.data()};
    ExecuteCopy(*unpack, from_chunk, reader.Bases());
  }
  ASSERT_EQ(at, truth.size());
}

#if defined(__SANITIZE_THREAD__) || defined(__SANITIZE_ADDRESS__)
constexpr int kScenes = 2000;
#else
constexpr int kScenes = 20000;
#endif

TEST(RandomPlan, PullsMoveExactlyTheRowsOfTheReader) {
  const uint64_t seed = TestSeed();
  int pulls = 0;
  for (int i = 0; i < kScenes; ++i) {
    SCOPED_TRACE(testing::Message() << "KVRELAY_SEED=" << seed << " scene " << i);
    Random random(seed + static_cast<uint64_t>(i));
    const Scene scene = RandomScene(random);
    TestCache direct = RandomCache(random, scene, scene.reader);
    TestCache packed = direct;
    TestCache expected = direct;
    const auto reader_blocks =
        RandomTable(random, direct.layout(), scene.reader_first, scene.tokens.end);
    const TableView reader_table{reader_blocks, scene.reader_first};
    expected.WriteAll(reader_table, scene.tokens);

    const auto sources = AssignSources(scene.reader, scene.owners);
    ASSERT_TRUE(sources.has_value()) << sources.error().ToString();
    for (const PullSource& source : *sources) {
      TestCache owner = RandomCache(random, scene, scene.owners[source.owner]);
      const auto owner_blocks =
          RandomTable(random, owner.layout(), scene.owner_first, scene.tokens.end);
      const TableView owner_table{owner_blocks, scene.owner_first};
      owner.WriteAll(owner_table, scene.tokens);
      Pull(owner, owner_table, direct, reader_table, source, scene.tokens);
      PullPacked(random, owner, owner_table, packed, reader_table, source, scene.tokens);
      if (HasFatalFailure()) return;
      pulls += 2;
    }
    ASSERT_TRUE(direct.SameBytes(expected));
    ASSERT_TRUE(packed.SameBytes(expected));
  }
  std::cout << kScenes << " scenes, " << pulls << " pulls" << std::endl;
  EXPECT_GT(pulls, kScenes);
}

}  // namespace
}  // namespace kvrelay
