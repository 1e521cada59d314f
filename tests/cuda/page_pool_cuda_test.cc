// A virtual KV cache on a GPU's pages, and a peer's view of the pool. Needs a GPU; skipped
// elsewhere.
#include "kvcache/cuda/page_pool_cuda.h"

#include <cuda_runtime_api.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <vector>

#include "kvcache/cuda/device_cuda.h"
#include "kvcache/virtual_kv_cache.h"

namespace kvrelay::cuda {
namespace {

using testing::AllOf;
using testing::HasSubstr;

class PagePoolCudaTest : public testing::Test {
 protected:
  void SetUp() override {
    const auto opened = OpenDevice(0);
    if (!opened.has_value()) GTEST_SKIP() << opened.error().message();
    driver_ = Driver::Find().value();
    page_ = Allocation::Granularity(driver_, 0).value();
  }
  // 4 rows of 8 pages, one token an eighth of a page.
  void OpenCache(uint64_t pool_pages) {
    const VirtualKvShape shape = {.num_layers = 4,
                                  .num_kv_heads = 8,
                                  .head_size = static_cast<uint32_t>(page_ / 8 / 4 / 2 / 8 / 2),
                                  .max_batch_size = 4,
                                  .max_seq_len = 64,
                                  .dtype = DType::kBf16,
                                  .page_size = page_,
                                  .block_size = 8,
                                  .megacache = true};
    const auto layouts = VirtualLayout::Make(std::vector{shape}).value();
    pages_ = PagePoolCuda::Create(driver_, 0, layouts[0].bytes(), page_).value();
    cache_ = VirtualKvCache::Create({{layouts[0], pages_}}).value();
    const Status reserved = cache_->ReservePhysicalPages(pool_pages * page_);
    ASSERT_TRUE(reserved.ok()) << reserved.ToString();
  }
  uint64_t PageOf(uint32_t row, uint32_t page) const {
    return cache_->layout().FirstPage(0, row) + page;
  }
  void Fill(uint32_t row, uint32_t page, int value) {
    ASSERT_EQ(cudaMemset(pages_->data() + PageOf(row, page) * page_, value, page_), cudaSuccess);
    ASSERT_EQ(cudaDeviceSynchronize(), cudaSuccess);
  }
  std::byte FirstOf(const std::byte* at) const {
    std::byte byte{};
    EXPECT_EQ(cudaMemcpy(&byte, at, 1, cudaMemcpyDeviceToHost), cudaSuccess);
    return byte;
  }

  Driver driver_;
  uint64_t page_ = 0;
  std::shared_ptr<PagePoolCuda> pages_;
  std::unique_ptr<VirtualKvCache> cache_;
};

TEST_F(PagePoolCudaTest, ARowIsContiguousWhateverPagesItHas) {
  OpenCache(6);
  const uint32_t a = cache_->AllocNewBatchIdx(16).value();
  const uint32_t b = cache_->AllocNewBatchIdx(16).value();
  ASSERT_TRUE(cache_->Extend(a, 32).ok());
  EXPECT_EQ(pages_->resident_bytes(), 6 * page_);
  for (uint32_t page = 0; page < 4; ++page) Fill(a, page, 10 + static_cast<int>(page));
  Fill(b, 0, 50);
  Fill(b, 1, 51);
  std::vector<std::byte> row(4 * page_);
  ASSERT_EQ(cudaMemcpy(row.data(), pages_->data() + PageOf(a, 0) * page_, row.size(),
                       cudaMemcpyDeviceToHost),
            cudaSuccess);
  for (uint64_t i = 0; i < row.size(); ++i) ASSERT_EQ(row[i], std::byte(10 + i / page_)) << i;

  // The pages of a freed row go to another while a third keeps its own.
  ASSERT_TRUE(cache_->FreeBatchIdx(b).ok());
  ASSERT_TRUE(cache_->Extend(a, 48).ok());
  EXPECT_EQ(pages_->PoolPage(PageOf(b, 0)), PagePoolCuda::kNoPage);
  EXPECT_EQ(FirstOf(pages_->data() + PageOf(a, 3) * page_), std::byte{13});
  Fill(a, 5, 15);
  EXPECT_THAT(cache_->Extend(a, 49).ToString(),
              AllOf(HasSubstr("kResourceExhausted"), HasSubstr("0 of 6 are free")));
}

TEST_F(PagePoolCudaTest, MapsAheadOnTheBackgroundThread) {
  OpenCache(8);
  const uint32_t row = cache_->AllocNewBatchIdx(8).value();
  std::vector<uint32_t> lens(4);
  lens[row] = 8;
  ASSERT_TRUE(cache_->StepAsync(lens).ok());
  cache_->WaitForBackground();
  EXPECT_EQ(cache_->metrics().pages_mapped_ahead, 1U);
  Fill(row, 1, 7);
  EXPECT_EQ(FirstOf(pages_->data() + PageOf(row, 1) * page_), std::byte{7});
}

TEST_F(PagePoolCudaTest, APeerMapsThePoolOnceAndReadsByPage) {
  OpenCache(4);
  auto peer = MapPagePool(driver_, 0, pages_->Export().value(), page_);
  ASSERT_TRUE(peer.has_value()) << peer.error().ToString();
  // Mapped after the export, and elsewhere later: the peer's addresses stay.
  for (int round = 0; round < 3; ++round) {
    const uint32_t row = cache_->AllocNewBatchIdx(24).value();
    for (uint32_t page = 0; page < 3; ++page) {
      Fill(row, page, 20 * round + static_cast<int>(page));
      const uint32_t index = pages_->PoolPage(PageOf(row, page));
      ASSERT_LT(index, 4U);
      EXPECT_EQ(FirstOf((*peer)->data() + index * page_),
                std::byte(20 * round + static_cast<int>(page)));
    }
    const uint32_t other = cache_->AllocNewBatchIdx(8).value();
    ASSERT_TRUE(cache_->FreeBatchIdx(row).ok());
    ASSERT_TRUE(cache_->FreeBatchIdx(other).ok());
  }
  EXPECT_FALSE(MapPagePool(driver_, 0, {}, page_).has_value());
}

TEST_F(PagePoolCudaTest, NamesThePagesThatTheDriverHas) {
  const auto pool = PagePoolCuda::Create(driver_, 0, page_, page_ / 32);
  ASSERT_FALSE(pool.has_value());
  EXPECT_THAT(pool.error().ToString(),
              AllOf(HasSubstr("kInvalidArgument"), HasSubstr(std::to_string(page_ / 32)),
                    HasSubstr("has pages of " + std::to_string(page_))));
}

}  // namespace
}  // namespace kvrelay::cuda
