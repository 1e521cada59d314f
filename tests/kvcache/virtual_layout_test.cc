#include "kvcache/virtual_layout.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <set>

#include "kvcache/kv_view.h"
#include "tests/kvcache/seed.h"

namespace kvrelay {
namespace {

using ::testing::HasSubstr;
using testing_support::Pick;

VirtualLayout LayoutOf(const VirtualKvShape& shape) {
  const auto layouts = VirtualLayout::Make(std::vector{shape});
  EXPECT_TRUE(layouts.has_value()) << layouts.error().ToString();
  return layouts->front();
}

VirtualKvShape SmallShape() {
  return {.num_layers = 4,
          .num_kv_heads = 2,
          .head_size = 32,
          .max_batch_size = 3,
          .max_seq_len = 100,
          .dtype = DType::kBf16,
          .page_size = 1 << 16,
          .block_size = 16};
}

TEST(VirtualLayout, KAndVOfEachLayerHaveARangeOfTheirOwn) {
  const VirtualLayout layout = LayoutOf(SmallShape());
  EXPECT_EQ(layout.ranges, 8U);
  EXPECT_EQ(layout.kv.token_stride, 2U * 32 * 2);
  // 128 bytes a token: 512 tokens are a page.
  EXPECT_EQ(layout.row_blocks, 32U);
  EXPECT_EQ(layout.row_pages(), 1U);
  EXPECT_EQ(layout.kv.num_blocks, 3U * 32);
  EXPECT_EQ(layout.bytes(), 8U * 3 << 16);
  EXPECT_EQ(layout.kv.v[3].offset, 7U * 3 << 16);
  EXPECT_EQ(layout.PagesFor(0), 0U);
  EXPECT_EQ(layout.PagesFor(1), 1U);
  EXPECT_TRUE(layout.rounds_up());
}

TEST(VirtualLayout, MegacacheHasTheLayersInsideAToken) {
  VirtualKvShape shape = SmallShape();
  shape.megacache = true;
  const VirtualLayout layout = LayoutOf(shape);
  EXPECT_EQ(layout.ranges, 1U);
  EXPECT_EQ(layout.kv.token_stride, 4U * 2 * 2 * 32 * 2);
  EXPECT_EQ(layout.kv.k[1].offset, 2U * 2 * 32 * 2);
  EXPECT_EQ(layout.kv.v[1].offset, 3U * 2 * 32 * 2);
  EXPECT_EQ(layout.PagesFor(64), 1U);
  EXPECT_EQ(layout.PagesFor(65), 2U);
}

// Whatever the shape: an ordinary layout, tokens of a row at one stride, rows in whole pages.
TEST(VirtualLayout, ARowIsContiguousAndItsPagesAreItsOwn) {
  testing_support::Random random(testing_support::TestSeed());
  constexpr DType kDTypes[] = {DType::kFp32, DType::kBf16, DType::kInt8};
  for (int i = 0; i < 300; ++i) {
    const uint32_t kind = Pick(random, 0, 2);
    const VirtualKvShape shape = {.num_layers = Pick(random, 1, 5),
                                  .num_kv_heads = Pick(random, 1, 6),
                                  .head_size = Pick(random, 1, 130),
                                  .max_batch_size = Pick(random, 1, 9),
                                  .max_seq_len = Pick(random, 1, 700),
                                  .dtype = kDTypes[Pick(random, 0, 2)],
                                  .page_size = uint64_t{1} << Pick(random, 12, 18),
                                  .block_size = Pick(random, 1, 33),
                                  .megacache = kind == 1,
                                  .format = kind == 2 ? KvFormat::kHnd : KvFormat::kNhd};
    const VirtualLayout layout = LayoutOf(shape);
    const KvLayout& kv = layout.kv;
    ASSERT_EQ(kv.Validate(std::vector<uint64_t>{layout.bytes()}).ToString(), "kOk");
    ASSERT_EQ(layout.row_bytes % layout.page_bytes, 0U);
    ASSERT_GE(layout.row_blocks * kv.block_size, shape.max_seq_len);

    // A page's first byte belongs to the row that FirstPage says, for every token of it.
    const uint32_t row = Pick(random, 0, shape.max_batch_size - 1);
    const uint32_t token = Pick(random, 0, shape.max_seq_len - 1);
    const uint32_t layer = Pick(random, 0, shape.num_layers - 1);
    const BlockId block = row * layout.row_blocks + token / kv.block_size;
    std::byte* const start = nullptr;
    const KvView view(kv, {start});
    const uint32_t head = Pick(random, 0, shape.num_kv_heads - 1);
    const auto at =
        static_cast<uint64_t>(view.V(layer, block, head, token % kv.block_size) - start);
    const uint32_t range = kind == 1   ? 0
                           : kind == 2 ? (2 * layer + 1) * shape.num_kv_heads + head
                                       : 2 * layer + 1;
    const uint64_t first = layout.FirstPage(range, row) * layout.page_bytes;
    const uint64_t inside =
        (kind == 2 ? 0 : head * kv.head_stride) + (kind == 1 ? kv.v[layer].offset : 0);
    ASSERT_EQ(at, first + token * kv.token_stride + inside);
    ASSERT_LT(at, first + layout.PagesFor(token + 1) * layout.page_bytes);
  }
}

TEST(VirtualLayout, EachHeadHasARangeInHnd) {
  VirtualKvShape shape = SmallShape();
  shape.format = KvFormat::kHnd;
  const VirtualLayout layout = LayoutOf(shape);
  EXPECT_EQ(layout.ranges, 16U);
  EXPECT_EQ(layout.kv.token_stride, 32U * 2);
  EXPECT_EQ(layout.kv.head_stride, layout.rows * layout.row_bytes);
}

TEST(VirtualLayout, RanksOfUnequalPartsShareTheirRows) {
  VirtualKvShape three = SmallShape();
  three.megacache = true;
  three.num_layers = 3;
  VirtualKvShape one = three;
  one.num_layers = 1;
  const auto layouts = VirtualLayout::Make(std::vector{three, one});
  ASSERT_TRUE(layouts.has_value()) << layouts.error().ToString();
  EXPECT_EQ(layouts->at(0).row_blocks, layouts->at(1).row_blocks);
  for (const VirtualLayout& layout : *layouts) {
    EXPECT_EQ(layout.row_bytes % layout.page_bytes, 0U);
    EXPECT_GE(layout.row_blocks * 16, 100U);
  }
}

TEST(VirtualLayout, SaysWhatIsWrong) {
  const auto message = [](auto change) {
    VirtualKvShape shape = SmallShape();
    change(shape);
    const auto layouts = VirtualLayout::Make(std::vector{shape});
    return layouts.has_value() ? "nothing" : layouts.error().ToString();
  };
  EXPECT_THAT(message([](auto& s) { s.num_layers = 0; }), HasSubstr("num_layers = 0"));
  EXPECT_THAT(message([](auto& s) { s.head_size = 0; }), HasSubstr("head_size = 0"));
  EXPECT_THAT(message([](auto& s) { s.format = KvFormat::kMla; }), HasSubstr("mla"));
  EXPECT_THAT(message([](auto& s) { s.format = KvFormat::kHnd, s.megacache = true; }),
              HasSubstr("hnd with the layers inside"));
  EXPECT_THAT(message([](auto& s) { s.page_size = 100000; }), HasSubstr("page_size = 100000"));
  EXPECT_THAT(message([](auto& s) { s.max_seq_len = s.max_batch_size = 1 << 24; }),
              HasSubstr("too much to address"));
  VirtualKvShape other = SmallShape();
  other.max_seq_len = 7;
  EXPECT_FALSE(VirtualLayout::Make(std::vector{SmallShape(), other}).has_value());
  EXPECT_FALSE(VirtualLayout::Make({}).has_value());
}

}  // namespace
}  // namespace kvrelay
