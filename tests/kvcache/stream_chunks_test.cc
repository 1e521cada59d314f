#include "kvcache/stream_chunks.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <functional>
#include <numeric>

namespace kvrelay {
namespace {

using ::testing::AllOf;
using ::testing::HasSubstr;

// 3 layers x K, V x 2 heads = 12 rows of 40 tokens of 64 bytes: 2560 bytes a row.
StreamShape SmallStream() {
  StreamShape shape;
  shape.layers = {1, 2, 3};
  shape.head_begin = 2;
  shape.head_end = 4;
  shape.tokens = {10, 50};
  shape.dtype = DType::kBf16;
  shape.head_dim = 32;
  return shape;
}

uint64_t Sum(const StreamChunks& chunks) {
  uint64_t sum = 0;
  for (uint32_t i = 0; i < chunks.count(); ++i) sum += chunks.bytes(i);
  return sum;
}

TEST(StreamChunks, HoldWholeRowsWhenARowFits) {
  const StreamChunks chunks = StreamChunks::Make(SmallStream(), 5 * 2560 + 100).value();
  EXPECT_EQ(SmallStream().bytes(), 12 * 2560U);
  ASSERT_EQ(chunks.count(), 3U);
  EXPECT_EQ(chunks.bytes(0), 5 * 2560U);
  EXPECT_EQ(chunks.bytes(2), 2 * 2560U);
  EXPECT_EQ(Sum(chunks), SmallStream().bytes());
}

TEST(StreamChunks, MakeSegmentsWhenARowIsTooLong) {
  const StreamChunks chunks = StreamChunks::Make(SmallStream(), 2000).value();  // 31 tokens
  ASSERT_EQ(chunks.count(), 24U);
  EXPECT_EQ(chunks.bytes(0), 31 * 64U);
  EXPECT_EQ(chunks.bytes(11), 31 * 64U);
  EXPECT_EQ(chunks.bytes(12), 9 * 64U);
  EXPECT_EQ(Sum(chunks), SmallStream().bytes());
}

TEST(StreamChunks, NeedWhatTheyHoldToBeComputed) {
  StreamShape shape = SmallStream();
  shape.segment_tokens = 16;
  const StreamChunks chunks = StreamChunks::Make(shape, 16 * 64).value();  // a row each
  const uint32_t first = shape.layers.front();
  const uint64_t rows = shape.bytes() / shape.tokens.size() / 64;
  const uint64_t rows_per_layer = rows / shape.layers.size();
  ASSERT_EQ(chunks.count(), rows * ((shape.tokens.size() + 15) / 16));
  for (uint32_t i = 0; i < chunks.count(); ++i) {
    const auto end = static_cast<uint32_t>(shape.tokens.begin + (i / rows + 1) * 16);
    const auto layers = static_cast<uint32_t>(i % rows / rows_per_layer + 1);
    EXPECT_EQ(chunks.ExtentOf(i, first),
              (KvExtent{.tokens = std::min(end, shape.tokens.end), .layers = layers}))
        << i;
  }
}

TEST(StreamChunks, AreAtMostAsLongAsAskedAndAddUp) {
  for (uint64_t chunk_bytes = 64; chunk_bytes < 40000; chunk_bytes += 61) {
    const StreamChunks chunks = StreamChunks::Make(SmallStream(), chunk_bytes).value();
    for (uint32_t i = 0; i < chunks.count(); ++i) {
      ASSERT_GT(chunks.bytes(i), 0U);
      ASSERT_LE(chunks.bytes(i), chunk_bytes);
    }
    ASSERT_EQ(Sum(chunks), SmallStream().bytes()) << chunk_bytes;
  }
}

TEST(CutStream, GivesPiecesThatAreNoLongerThanAskedAndFollowEachOther) {
  const StreamShape shape = SmallStream();
  EXPECT_EQ(CutStream(shape, UINT64_MAX), std::vector{shape});
  EXPECT_EQ(CutStream(shape, shape.bytes()), std::vector{shape});
  constexpr uint64_t kTokenBytes = 12 * 64;
  for (const uint64_t most : {uint64_t{1}, kTokenBytes, 7 * kTokenBytes + 5}) {
    uint32_t next = shape.tokens.begin;
    for (const StreamShape& piece : CutStream(shape, most)) {
      EXPECT_EQ(piece.tokens.begin, next);
      EXPECT_LT(piece.tokens.begin, piece.tokens.end);
      EXPECT_LE(piece.bytes(), std::max(most, kTokenBytes));
      EXPECT_EQ(piece.layers, shape.layers);
      next = piece.tokens.end;
    }
    EXPECT_EQ(next, shape.tokens.end);
  }
}

TEST(CutStream, KeepsPagesWhole) {
  StreamShape shape = SmallStream();  // tokens 10 to 50
  shape.page_tokens = 16;
  shape.page_bytes = 100;
  const std::vector<StreamShape> pieces = CutStream(shape, 2 * 12 * 100);
  ASSERT_EQ(pieces.size(), 2U);
  EXPECT_EQ(pieces[0].tokens, (TokenRange{10, 32}));
  EXPECT_EQ(pieces[1].tokens, (TokenRange{32, 50}));
  EXPECT_EQ(pieces[0].bytes() + pieces[1].bytes(), shape.bytes());
}

TEST(StreamChunks, TooSmallForOneTokenIsRefused) {
  const auto chunks = StreamChunks::Make(SmallStream(), 63);
  ASSERT_FALSE(chunks.has_value());
  EXPECT_THAT(chunks.error().message(), AllOf(HasSubstr("63"), HasSubstr("64")));
}

TEST(StreamChunks, EmptyOrAbsurdShapesAreRefused) {
  const std::function<void(StreamShape&)> spoils[] = {
      [](StreamShape& s) { s.layers.clear(); },
      [](StreamShape& s) {
        s.layers = {2, 1};
      },
      [](StreamShape& s) {
        s.layers = {2, 2};
      },
      [](StreamShape& s) { s.layers.resize(5000); },
      [](StreamShape& s) { s.head_end = s.head_begin; },
      [](StreamShape& s) { s.head_end = UINT32_MAX; },
      [](StreamShape& s) {
        s.tokens = {7, 7};
      },
      [](StreamShape& s) {
        s.tokens = {8, 7};
      },
      [](StreamShape& s) {
        s.tokens = {0, UINT32_MAX};
      },
      [](StreamShape& s) { s.head_dim = 0; },
      [](StreamShape& s) { s.head_dim = UINT32_MAX; },
      [](StreamShape& s) { s.dtype = static_cast<DType>(200); },
  };
  for (const auto& spoil : spoils) {
    StreamShape shape = SmallStream();
    spoil(shape);
    const auto chunks = StreamChunks::Make(shape, UINT64_MAX);
    ASSERT_FALSE(chunks.has_value()) << &spoil - spoils;
    EXPECT_EQ(chunks.error().code(), Code::kInvalidArgument);
  }
  StreamShape many = SmallStream();
  many.layers.resize(4096), many.head_end = 4098, many.tokens = {0, 1U << 20};
  std::iota(many.layers.begin(), many.layers.end(), 0);
  EXPECT_THAT(StreamChunks::Make(many, 64).error().message(), HasSubstr("too many chunks"));
}

class StreamPlans : public ::testing::Test {
 protected:
  const KvLayout layout_ = KvLayout::Dense(KvFormat::kHnd, DType::kBf16, 5, 4, 32, 16, 10);
  const KvShard shard_ = KvShard::Make(5, 4, 1, 0).value();
  const std::vector<BlockId> blocks_ = {1, 2, 3, 4};
  const StreamChunks chunks_ = StreamChunks::Make(SmallStream(), 5 * 2560).value();
};

TEST_F(StreamPlans, FitTheCacheAndTheChunk) {
  const std::vector<uint64_t> cache = {layout_.dense_bytes()};
  for (uint32_t i = 0; i < chunks_.count(); ++i) {
    const std::vector<uint64_t> chunk = {chunks_.bytes(i)};
    const auto pack = chunks_.PlanPack({layout_, shard_, {blocks_}}, i);
    ASSERT_TRUE(pack.has_value()) << pack.error().ToString();
    EXPECT_TRUE(pack->Validate(cache, chunk).ok());
    EXPECT_EQ(pack->bytes(), chunks_.bytes(i));
    const auto unpack = chunks_.PlanUnpack({layout_, shard_, {blocks_}}, i);
    ASSERT_TRUE(unpack.has_value()) << unpack.error().ToString();
    EXPECT_TRUE(unpack->Validate(chunk, cache).ok());
    EXPECT_EQ(unpack->bytes(), chunks_.bytes(i));
  }
}

TEST_F(StreamPlans, RefuseWhatTheCacheIsNot) {
  const auto refused = [&](const KvLayout& layout, const KvShard& shard, TableView table,
                           uint32_t chunk) {
    const auto plan = chunks_.PlanPack({layout, shard, table}, chunk);
    return plan ? Code::kOk : plan.error().code();
  };
  EXPECT_EQ(refused(layout_, shard_, {blocks_}, 2), Code::kOk);
  EXPECT_EQ(refused(layout_, shard_, {blocks_}, 3), Code::kInvalidArgument);
  EXPECT_EQ(refused(layout_, shard_, {blocks_, 16}, 0), Code::kInvalidArgument);
  EXPECT_EQ(refused(layout_, shard_, {std::span(blocks_).first(3)}, 0), Code::kInvalidArgument);
  const std::vector<BlockId> bad = {1, 2, 10, 4};
  EXPECT_EQ(refused(layout_, shard_, {bad}, 0), Code::kInvalidArgument);

  KvLayout other = layout_;
  other.dtype = DType::kFp16;
  EXPECT_EQ(refused(other, shard_, {blocks_}, 0), Code::kOk) << "a cast";
  other = layout_;
  other.head_dim = 16;
  EXPECT_EQ(refused(other, shard_, {blocks_}, 0), Code::kIncompatible);
  other = layout_;
  other.v.clear();
  EXPECT_EQ(refused(other, shard_, {blocks_}, 0), Code::kIncompatible);

  KvShard half = shard_;
  half.head_begin = 0, half.head_count = 2;
  other = layout_;
  other.kv_heads = 2;
  EXPECT_EQ(refused(other, half, {blocks_}, 0), Code::kInvalidArgument);
  KvShard stage = shard_;
  stage.layer_begin = 2, stage.layer_count = 3;
  other = layout_;
  other.k.resize(3), other.v.resize(3);
  const auto plan = chunks_.PlanUnpack({other, stage, {blocks_}}, 0);
  ASSERT_FALSE(plan.has_value());
  EXPECT_THAT(plan.error().message(), HasSubstr("layers 1 to 4 are not held by reader"));
}

}  // namespace
}  // namespace kvrelay
