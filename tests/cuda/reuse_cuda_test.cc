// The owner of a lease writes its blocks anew the moment it has ended it, while readers pull them
// through mapped memory on GPUs: whatever is served is the lease's, byte by byte. Needs a GPU;
// skipped elsewhere.
#include <cuda_runtime_api.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstring>
#include <optional>
#include <string>
#include <thread>
#include <vector>

#include "kvcache/cuda/device_cuda.h"
#include "kvcache/cuda/long_runs.h"
#include "tests/common/from_env.h"
#include "tests/common/temp_dir.h"
#include "tests/cuda/gpu_end.h"
#include "tests/kvcache/seed.h"

namespace kvrelay::cuda {
namespace {

using std::chrono::steady_clock;
using testing_support::Pick;
using testing_support::Random;
using testing_support::TestSeed;
using transport::BegunRead;
using transport::Completion;
using transport::GuardRef;
using transport::PeerHandle;

constexpr uint64_t kHash = 0x1234567;

// Every second slice of 2 KiB.
CopyPlan Slices(uint64_t bytes) {
  CopyPlan plan;
  plan.boxes.resize(1);
  CopyBox& box = plan.boxes[0];
  box.run_bytes = 2 << 10;
  box.inner = {.count = 8, .src_stride = 4 << 10, .dst_stride = 2 << 10};
  box.num_segments = static_cast<uint32_t>(bytes / (32 << 10));
  box.num_places = 1;
  plan.places = {{0, 0, 0, 0}};
  for (uint64_t block = 0; block < box.num_segments; ++block) {
    plan.segments.push_back({.src = block * (32 << 10), .dst = block * (16 << 10)});
  }
  return plan;
}
CopyPlan OneRun(uint64_t bytes) {
  CopyPlan plan;
  plan.boxes.resize(1);
  plan.boxes[0].run_bytes = bytes;
  plan.places = {{0, 0, 0, 0}};
  plan.segments = {{0, 0}};
  return plan;
}

int ByteOf(uint64_t epoch) { return static_cast<int>(epoch % 251 + 1); }

// Leases one after the other over the same blocks, each ended after a random time. All bytes of a
// lease's KV are ByteOf its epoch.
class ReusingOwner {
 public:
  ReusingOwner(GpuEnd& side, int gpu) : side_(side), thread_([this, gpu] { Run(gpu); }) {}
  ~ReusingOwner() {
    stop_ = true;
    thread_.join();
  }
  // Of the lease that is live, or was a moment ago; 0: none yet.
  uint64_t epoch() const { return epoch_; }

 private:
  void Run(int gpu) {
    KVRELAY_CUDA(cudaSetDevice(gpu));
    cudaStream_t stream = nullptr;
    KVRELAY_CUDA(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking));
    Random random(TestSeed());
    for (uint64_t epoch = 1; !stop_; ++epoch) {
      // The last lease has just ended.
      KVRELAY_CUDA(cudaMemsetAsync(side_.kv.data(), ByteOf(epoch), side_.kv.bytes(), stream));
      KVRELAY_CUDA(cudaStreamSynchronize(stream));
      side_.record().Start(epoch, side_.incarnation, kHash);
      side_.record().Publish({.tokens = 1, .chunk_end = 1, .layers = 0});
      epoch_ = epoch;
      const auto end = steady_clock::now() + std::chrono::microseconds(Pick(random, 0, 80));
      while (steady_clock::now() < end) {
      }
      side_.record().End();
    }
    KVRELAY_CUDA(cudaStreamDestroy(stream));
  }

  GpuEnd& side_;
  std::atomic<bool> stop_ = false;
  std::atomic<uint64_t> epoch_ = 0;
  std::thread thread_;
};

struct Served {
  uint64_t pulls = 0;
  uint64_t served = 0;
  uint64_t stale = 0;      // of them with a byte of another lease
  uint64_t prevented = 0;  // not served: the lease ended meanwhile
  uint64_t torn = 0;       // of them with a byte of another lease
};

class ReuseCudaTest : public testing::Test {
 protected:
  // How many pulls; fewer where a tool makes each slow.
  static uint64_t Pulls(uint64_t wanted) {
    return std::min(wanted, tests::FromEnv("KVRELAY_MOST_PULLS", wanted));
  }

  static Served Pull(int reader_gpu, uint64_t kv_bytes, const CopyPlan& plan, uint64_t pulls) {
    Served count;
    const tests::TempDir folder;
    GpuEnd owner(OpenDevice(0).value(), kv_bytes, folder.path(), 11);
    GpuEnd reader(OpenDevice(reader_gpu).value(), kv_bytes, folder.path(), 12);
    const PeerHandle peer = reader.Connect(owner.Spec()).value();
    const uint64_t bytes = plan.bytes();
    void* memory = nullptr;
    KVRELAY_CUDA(cudaSetDevice(reader_gpu));
    KVRELAY_CUDA(cudaHostAlloc(&memory, bytes, cudaHostAllocDefault));
    const auto* const got = static_cast<const uint8_t*>(memory);
    const ReusingOwner reusing(owner, 0);
    const auto give_up = steady_clock::now() + std::chrono::seconds(150);
    while (count.pulls < pulls && steady_clock::now() < give_up) {
      const GuardExpectation want{.epoch = reusing.epoch(),
                                  .incarnation = owner.incarnation,
                                  .table_hash = kHash,
                                  .extent = {.tokens = 1}};
      const auto read = reader.way->Begin(peer, plan, GuardRef{.region = GpuEnd::kRecords}, want);
      if (read == nullptr) continue;  // it has ended already
      std::optional<Completion> completion;
      while (!completion) completion = read->Look();
      EXPECT_TRUE(completion->status.ok()) << completion->status.ToString();
      if (!completion->status.ok()) break;
      ++count.pulls;
      KVRELAY_CUDA(cudaMemcpy(memory, reader.kv.data(), bytes, cudaMemcpyDeviceToHost));
      const auto byte = static_cast<uint8_t>(ByteOf(want.epoch));
      const bool right = got[0] == byte && std::memcmp(got, got + 1, bytes - 1) == 0;
      if (GuardHolds(want, completion->before, completion->after)) {
        ++count.served;
        if (!right) ++count.stale;
      } else {
        ++count.prevented;
        if (!right) ++count.torn;
      }
    }
    cudaFreeHost(memory);
    return count;
  }

  static void Expect(const Served& count, uint64_t pulls) {
    std::cout << count.pulls << " pulls: " << count.served << " served, " << count.stale
              << " of them stale; " << count.prevented << " not served, " << count.torn
              << " of them with bytes of another lease\n";
    EXPECT_EQ(count.pulls, pulls);
    EXPECT_EQ(count.stale, 0U);
    EXPECT_GT(count.served, 0U);
    EXPECT_GT(count.torn, 0U) << "the owner was never quick enough: this tested nothing";
  }

  static int Gpus() {
    int count = 0;
    return cudaGetDeviceCount(&count) == cudaSuccess ? count : 0;
  }
};

TEST_F(ReuseCudaTest, NothingStaleIsServedWithinAGpu) {
  if (Gpus() < 1) GTEST_SKIP() << "no CUDA device";
  const uint64_t pulls = Pulls(100'000);
  Expect(Pull(0, 512 << 10, Slices(512 << 10), pulls), pulls);
}

TEST_F(ReuseCudaTest, NothingStaleIsServedToAnotherGpu) {
  int peer = 0;
  if (Gpus() < 2 || cudaDeviceCanAccessPeer(&peer, 1, 0) != cudaSuccess || peer == 0) {
    GTEST_SKIP() << "no two CUDA devices with peer access";
  }
  const uint64_t pulls = Pulls(100'000);
  Expect(Pull(1, 512 << 10, Slices(512 << 10), pulls), pulls);
}

TEST_F(ReuseCudaTest, NothingStaleIsServedByTheCopyEngine) {
  if (Gpus() < 1) GTEST_SKIP() << "no CUDA device";
  const uint64_t pulls = Pulls(2'000);
  Expect(Pull(0, kLongRunWithin, OneRun(kLongRunWithin), pulls), pulls);
}

}  // namespace
}  // namespace kvrelay::cuda
