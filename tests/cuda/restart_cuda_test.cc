// Owners with KV on a GPU are processes that are killed, and started again: a reader lets go of the
// memory of each, and keeps nothing. And memory that an owner's engine allocated by itself. Needs a
// GPU; skipped elsewhere.
#include <cuda_runtime_api.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <atomic>
#include <chrono>
#include <filesystem>
#include <iostream>
#include <memory>
#include <optional>
#include <string>
#include <thread>
#include <vector>

#include "kvcache/cuda/device_cuda.h"
#include "tests/common/from_env.h"
#include "tests/common/temp_dir.h"
#include "tests/cuda/gpu_end.h"
#include "tests/transport/child.h"

namespace kvrelay::cuda {
namespace {

using std::chrono::steady_clock;
using testing::HasSubstr;
using transport::Child;
using transport::Completion;

constexpr uint64_t kOwnersHash = 0x5151;
constexpr uint64_t kReadBytes = 1 << 20;
constexpr uint64_t kUsersOffset = 768;  // of memory inside the user's allocation

GuardExpectation OwnersLease(Incarnation incarnation) {
  return {
      .epoch = 9, .incarnation = incarnation, .table_hash = kOwnersHash, .extent = {.tokens = 1}};
}
std::byte OwnersByte(Incarnation incarnation) { return std::byte(incarnation % 251 + 1); }

CopyPlan FirstBytes() {
  CopyPlan plan;
  plan.boxes.resize(1);
  plan.boxes[0].run_bytes = 4096;
  plan.boxes[0].num_segments = kReadBytes / 4096;
  plan.places = {{0, 0, 0, 0}};
  for (uint64_t i = 0; i < kReadBytes / 4096; ++i) plan.segments.push_back({i * 4096, i * 4096});
  return plan;
}

// RUN_DIR INCARNATION BYTES own|malloc: an owner of that memory, every byte OwnersByte. Says its
// address, or why it cannot.
int RunGpuOwner(const std::vector<std::string>& arguments) {
  const Incarnation incarnation = std::stoull(arguments[1]);
  const uint64_t bytes = std::stoull(arguments[2]);
  const auto device = OpenDevice(0);
  if (!device.has_value()) return 1;
  void* users = nullptr;
  if (arguments[3] == "malloc") KVRELAY_CUDA(cudaMalloc(&users, bytes + 2 * kUsersOffset));
  auto kv = users == nullptr
                ? (*device)->Allocate(bytes, "kv")
                : (*device)->Register(static_cast<std::byte*>(users) + kUsersOffset, bytes, "kv");
  if (!kv.has_value()) {
    std::cout << kv.error().ToString() << std::endl;
    return 1;
  }
  KVRELAY_CUDA(cudaMemset(kv->data(), static_cast<int>(OwnersByte(incarnation)), bytes));
  KVRELAY_CUDA(cudaDeviceSynchronize());
  const GpuEnd owner(*device, *std::move(kv), arguments[0], incarnation);
  owner.record().Start(9, incarnation, kOwnersHash);
  owner.record().Publish({.tokens = 1, .chunk_end = 1, .layers = 0});
  std::cout << owner.kv.place().exported << std::endl << owner.way->LocalAddress() << std::endl;
  std::string line;
  std::getline(std::cin, line);
  return 0;
}
const transport::RegisterChild kGpuOwner("gpu-owner", RunGpuOwner);

size_t FreeBytes() {
  size_t free = 0;
  size_t all = 0;
  KVRELAY_CUDA(cudaMemGetInfo(&free, &all));
  return free;
}
size_t OpenDescriptors() {
  return static_cast<size_t>(std::distance(std::filesystem::directory_iterator("/proc/self/fd"),
                                           std::filesystem::directory_iterator()));
}

class RestartCudaTest : public testing::Test {
 protected:
  void SetUp() override {
    const auto opened = OpenDevice(0);
    if (!opened.has_value()) GTEST_SKIP() << opened.error().message();
    device_ = *opened;
    reader_.emplace(device_, kReadBytes, folder_.path(), 1);
  }

  // An owner process, the way to it, and its end.
  struct Owner {
    std::unique_ptr<Child> process;
    Incarnation incarnation = 0;
    std::string exported;
    transport::PeerHandle peer = 0;
    std::shared_ptr<std::atomic<bool>> dead = std::make_shared<std::atomic<bool>>(false);
  };
  Owner StartOwner(uint64_t bytes, const std::string& how) {
    Owner owner;
    owner.incarnation = ++incarnation_;
    owner.process = std::make_unique<Child>(
        "gpu-owner",
        std::vector{folder_.path(), std::to_string(owner.incarnation), std::to_string(bytes), how});
    owner.exported = owner.process->Receive(std::chrono::seconds(60));
    const std::string address = owner.process->Receive(std::chrono::seconds(60));
    EXPECT_FALSE(address.empty()) << owner.exported;
    const auto peer = reader_->Connect({.name = "owner",
                                        .address = address,
                                        .region_bytes = {bytes, 4096},
                                        .incarnation = owner.incarnation},
                                       [dead = owner.dead] { *dead = true; });
    EXPECT_TRUE(peer.has_value()) << peer.error().ToString();
    owner.peer = peer.value_or(0);
    return owner;
  }
  void Pull(const Owner& owner) {
    const GuardExpectation want = OwnersLease(owner.incarnation);
    const auto read =
        reader_->way->Begin(owner.peer, FirstBytes(), {.region = GpuEnd::kRecords}, want);
    ASSERT_NE(read, nullptr);
    std::optional<Completion> completion;
    while (!completion) completion = read->Look();
    ASSERT_TRUE(completion->status.ok()) << completion->status.ToString();
    ASSERT_TRUE(GuardHolds(want, completion->before, completion->after));
  }
  void ExpectOwnersBytes(const Owner& owner) const {
    const std::vector<std::byte> got = reader_->Get();
    EXPECT_EQ(std::ranges::count(got, OwnersByte(owner.incarnation)),
              static_cast<ptrdiff_t>(kReadBytes));
  }
  // Kills it and waits until the reader has let go: less than a second.
  void Kill(Owner& owner) {
    owner.process->KillAndWait();
    const auto begin = steady_clock::now();
    while (!*owner.dead && steady_clock::now() < begin + std::chrono::seconds(5)) {
      std::this_thread::sleep_for(std::chrono::milliseconds(1));
    }
    EXPECT_LT(steady_clock::now() - begin, std::chrono::seconds(1));
  }

  const tests::TempDir folder_;
  std::shared_ptr<Device> device_;
  std::optional<GpuEnd> reader_;
  Incarnation incarnation_ = 100;
};

TEST_F(RestartCudaTest, AnOwnerOfMostOfTheGpuIsKilledAndStartedAgain) {
  const uint64_t bytes = (FreeBytes() / 5 * 3) >> 21 << 21;
  for (int round = 0; round < 3; ++round) {
    const auto begin = steady_clock::now();
    Owner owner = StartOwner(bytes, "own");
    ASSERT_NE(owner.peer, 0U);
    std::cout << bytes << " bytes, " << owner.exported << ", up and mapped in "
              << ToMillis(steady_clock::now() - begin) << " ms\n";
    Pull(owner);
    ExpectOwnersBytes(owner);
    Kill(owner);
    // What an imported mapping pins is free again before the next one asks for it.
    const auto limit = steady_clock::now() + std::chrono::seconds(2);
    while (FreeBytes() < bytes && steady_clock::now() < limit) {
      std::this_thread::sleep_for(std::chrono::milliseconds(1));
    }
    std::cout << "free again " << ToMillis(steady_clock::now() - limit + std::chrono::seconds(2))
              << " ms after its death was seen\n";
    ASSERT_GE(FreeBytes(), bytes);
  }
}

TEST_F(RestartCudaTest, RestartsAndPullsLeaveNothingBehind) {
  const uint64_t restarts = tests::FromEnv("KVRELAY_MOST_RESTARTS", 100);
  size_t free = 0;
  size_t descriptors = 0;
  uint64_t pulls = 0;
  for (uint64_t round = 0; round < restarts; ++round) {
    {
      Owner owner = StartOwner(8 << 20, "own");
      ASSERT_NE(owner.peer, 0U);
      for (int i = 0; i < 100; ++i, ++pulls) {
        Pull(owner);
        if (HasFatalFailure()) return;
      }
      ExpectOwnersBytes(owner);
      Kill(owner);
    }
    if (round == 0) {  // what is made once is there
      std::this_thread::sleep_for(std::chrono::milliseconds(200));
      free = FreeBytes();
      descriptors = OpenDescriptors();
    }
  }
  std::this_thread::sleep_for(std::chrono::milliseconds(200));
  std::cout << restarts << " owners, " << pulls << " pulls: descriptors " << descriptors << " -> "
            << OpenDescriptors() << ", free bytes " << free << " -> " << FreeBytes() << "\n";
  EXPECT_EQ(OpenDescriptors(), descriptors);
  EXPECT_GE(FreeBytes() + (4 << 20), free);
}

TEST_F(RestartCudaTest, MemoryOfCudaMallocIsPulled) {
  Owner owner = StartOwner(5'000'000, "malloc");
  ASSERT_NE(owner.peer, 0U);
  EXPECT_EQ(owner.exported, "CUDA IPC (peers could write)");
  Pull(owner);
  ExpectOwnersBytes(owner);
  // Its end leaves the reader's own copies and other owners alone.
  Kill(owner);
  Owner next = StartOwner(5'000'000, "malloc");
  ASSERT_NE(next.peer, 0U);
  Pull(next);
  ExpectOwnersBytes(next);
}

TEST_F(RestartCudaTest, WhatOthersCannotMapIsRefusedWithTheReason) {
  const auto why = [&](void* data, uint64_t offset, uint64_t bytes) {
    const auto region = device_->Register(static_cast<std::byte*>(data) + offset, bytes, "users");
    if (region.has_value()) return "registered as " + region->place().exported;
    std::cout << region.error().ToString() << "\n";
    return region.error().ToString();
  };
  const auto host = Region::AllocateHost(1 << 20, "host");
  EXPECT_THAT(why(host->data(), 0, 1 << 20), HasSubstr("kInvalidArgument: region users: 1048576"));

  void* memory = nullptr;
  KVRELAY_CUDA(cudaMalloc(&memory, 4 << 20));
  EXPECT_EQ(why(memory, 512, 1 << 20), "registered as CUDA IPC (peers could write)");
  EXPECT_THAT(why(memory, 0, 64 << 20), HasSubstr("not inside one allocation"));
  KVRELAY_CUDA(cudaFree(memory));

  KVRELAY_CUDA(cudaMallocAsync(&memory, 4 << 20, nullptr));
  KVRELAY_CUDA(cudaStreamSynchronize(nullptr));
  EXPECT_THAT(why(memory, 0, 4 << 20), HasSubstr("kInvalidArgument"));
  KVRELAY_CUDA(cudaFreeAsync(memory, nullptr));

  const Region ours = device_->Allocate(5'000'000, "ours").value();
  EXPECT_EQ(why(ours.data(), 0, 5'000'000), "registered as CUDA virtual memory");
  EXPECT_THAT(why(ours.data(), 512, 4'000'000), HasSubstr("mapped by others as a whole"));
  const Region again = device_->Register(ours.data(), 5'000'000, "again").value();
  const auto mapping = device_->Map(UniqueFd(::dup(again.export_fd())), 5'000'000);
  EXPECT_TRUE(mapping.has_value()) << mapping.error().ToString();
}

}  // namespace
}  // namespace kvrelay::cuda
