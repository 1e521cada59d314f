// A GPU as a Device: its memory, the same memory mapped as a peer would, and plans between them.
// Needs a GPU; skipped elsewhere.
#include "kvcache/cuda/device_cuda.h"

#include <cuda_runtime_api.h>
#include <fcntl.h>
#include <gtest/gtest.h>
#include <unistd.h>

#include <cstring>
#include <thread>
#include <vector>

#include "attention/cuda/device_array.h"

namespace kvrelay::cuda {
namespace {

using testing::Test;

constexpr uint64_t kBytes = 5'000'000;  // no whole number of pages

std::vector<std::byte> Pattern(uint64_t bytes, uint32_t seed) {
  std::vector<std::byte> pattern(bytes);
  for (uint64_t i = 0; i < bytes; ++i) {
    pattern[i] = static_cast<std::byte>((i * 2654435761U + seed) >> 11);
  }
  return pattern;
}

// Rows of 96 bytes, every second one, in reverse order of blocks.
CopyPlan Rows() {
  CopyPlan plan;
  plan.boxes.resize(1);
  CopyBox& box = plan.boxes[0];
  box.run_bytes = 96;
  box.inner = {.count = 100, .src_stride = 192, .dst_stride = 96};
  box.num_segments = 200;
  box.num_places = 1;
  plan.places = {{0, 0, 0, 0}};
  for (uint64_t block = 0; block < 200; ++block) {
    plan.segments.push_back({.src = block * 19'200, .dst = (199 - block) * 9'600});
  }
  return plan;
}

class DeviceCudaTest : public Test {
 protected:
  void SetUp() override {
    auto opened = OpenDevice(0);
    if (!opened.has_value()) GTEST_SKIP() << opened.error().message();
    device_ = *opened;
  }
  Region Allocate(uint64_t bytes) {
    auto region = device_->Allocate(bytes, "test");
    EXPECT_TRUE(region.has_value()) << region.error().ToString();
    return *std::move(region);
  }
  std::unique_ptr<DeviceMapping> Map(const Region& region) {
    auto mapping = device_->Map(UniqueFd(::dup(region.export_fd())), region.bytes());
    EXPECT_TRUE(mapping.has_value()) << mapping.error().ToString();
    return *std::move(mapping);
  }
  Status Run(const CopyPlan& plan, const std::byte* src, std::byte* dst) {
    auto copy = device_->Copy(plan, std::vector{src}, std::vector{dst});
    if (!copy.has_value()) return copy.error();
    while (true) {
      if (std::optional<Status> ended = (*copy)->Ended()) return *ended;
    }
  }

  std::shared_ptr<Device> device_;
};

TEST_F(DeviceCudaTest, MemoryIsZeroedAndSaysWhereItIs) {
  const Region region = Allocate(kBytes);
  EXPECT_EQ(region.bytes(), kBytes);
  EXPECT_EQ(region.place().kind, DeviceKind::kCuda);
  EXPECT_EQ(region.place().device, "cuda:0");
  EXPECT_NE(::fcntl(region.export_fd(), F_GETFD) & FD_CLOEXEC, 0);
  std::vector<std::byte> host(kBytes, std::byte{1});
  KVRELAY_CUDA(cudaMemcpy(host.data(), region.data(), kBytes, cudaMemcpyDeviceToHost));
  EXPECT_EQ(std::count(host.begin(), host.end(), std::byte{0}), static_cast<ptrdiff_t>(kBytes));
}

TEST_F(DeviceCudaTest, MoreThanThereIsIsAnError) {
  const auto region = device_->Allocate(uint64_t{1} << 42, "too large");
  ASSERT_FALSE(region.has_value());
  EXPECT_EQ(region.error().code(), Code::kResourceExhausted);
  std::cout << region.error().ToString() << "\n";
  EXPECT_EQ(Allocate(kBytes).bytes(), kBytes) << "the device goes on";
}

TEST_F(DeviceCudaTest, PlansMoveWhatTheyWouldOnTheHost) {
  const Region owner = Allocate(kBytes);
  const Region reader = Allocate(kBytes);
  const std::vector<std::byte> pattern = Pattern(kBytes, 7);
  KVRELAY_CUDA(cudaMemcpy(owner.data(), pattern.data(), kBytes, cudaMemcpyHostToDevice));
  const auto mapping = Map(owner);
  ASSERT_NE(mapping->data(), owner.data());
  const CopyPlan plan = Rows();
  for (int again = 0; again < 3; ++again) {
    KVRELAY_CUDA(cudaMemset(reader.data(), 0x5a, kBytes));
    ASSERT_TRUE(Run(plan, mapping->data(), reader.data()).ok());
    std::vector<std::byte> got(kBytes);
    KVRELAY_CUDA(cudaMemcpy(got.data(), reader.data(), kBytes, cudaMemcpyDeviceToHost));
    std::vector<std::byte> want(kBytes, std::byte{0x5a});
    for (const CopySegment& segment : plan.segments) {
      for (uint64_t row = 0; row < 100; ++row) {
        std::memcpy(&want[segment.dst + row * 96], &pattern[segment.src + row * 192], 96);
      }
    }
    ASSERT_TRUE(got == want);
  }
}

TEST_F(DeviceCudaTest, AMappingOutlivesItsOwner) {
  const std::vector<std::byte> pattern = Pattern(kBytes, 9);
  std::unique_ptr<DeviceMapping> mapping;
  {
    const Region owner = Allocate(kBytes);
    KVRELAY_CUDA(cudaMemcpy(owner.data(), pattern.data(), kBytes, cudaMemcpyHostToDevice));
    mapping = Map(owner);
  }
  std::vector<std::byte> got(kBytes);
  KVRELAY_CUDA(cudaMemcpy(got.data(), mapping->data(), kBytes, cudaMemcpyDeviceToHost));
  EXPECT_TRUE(got == pattern);
}

TEST_F(DeviceCudaTest, WhatIsNoSuchMemoryIsRefused) {
  const auto code = [](const auto& mapping) {
    if (mapping.has_value()) return Code::kOk;
    std::cout << mapping.error().ToString() << "\n";
    return mapping.error().code();
  };
  EXPECT_EQ(code(device_->Map(UniqueFd(::open("/dev/null", O_RDONLY)), kBytes)),
            Code::kInvalidArgument);
  const auto host = Region::AllocateHost(kBytes, "host");
  EXPECT_EQ(code(device_->Map(UniqueFd(::dup(host->export_fd())), kBytes)), Code::kInvalidArgument);
  const Region small = Allocate(kBytes);
  EXPECT_EQ(code(device_->Map(UniqueFd(::dup(small.export_fd())), 4 * kBytes)),
            Code::kInvalidArgument)
      << "it announced more than there is";
}

TEST_F(DeviceCudaTest, CopiesOfManyThreadsEnd) {
  const Region owner = Allocate(kBytes);
  const std::vector<std::byte> pattern = Pattern(kBytes, 3);
  KVRELAY_CUDA(cudaMemcpy(owner.data(), pattern.data(), kBytes, cudaMemcpyHostToDevice));
  const auto mapping = Map(owner);
  std::vector<std::thread> threads;
  for (int t = 0; t < 4; ++t) {
    threads.emplace_back([&] {
      const Region reader = Allocate(kBytes);
      for (int i = 0; i < 200; ++i) {
        if (i % 3 == 0) {  // its end waits for the device
          EXPECT_TRUE(
              device_->Copy(Rows(), std::vector{mapping->data()}, std::vector{reader.data()})
                  .has_value());
        } else {
          EXPECT_TRUE(Run(Rows(), mapping->data(), reader.data()).ok());
        }
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
}

TEST_F(DeviceCudaTest, TenThousandMappingsLeaveNothingBehind) {
  const Region owner = Allocate(kBytes);
  size_t before = 0;
  size_t after = 0;
  size_t all = 0;
  for (int i = 0; i < 10; ++i) Map(owner);
  KVRELAY_CUDA(cudaMemGetInfo(&before, &all));
  for (int i = 0; i < 10'000; ++i) Map(owner);
  KVRELAY_CUDA(cudaMemGetInfo(&after, &all));
  EXPECT_GE(after + (4 << 20), before);
}

}  // namespace
}  // namespace kvrelay::cuda
