#include "kvcache/cuda/copy_lane.h"

#include <bit>
#include <chrono>
#include <new>
#include <vector>

#include "kvcache/cuda/cuda_status.h"
#include "kvcache/cuda/gather_args.h"

namespace kvrelay::cuda {
namespace {

constexpr size_t kLeastTables = 64 << 10;
constexpr Duration kAskEvery = Millis(1);

}  // namespace

Result<std::unique_ptr<CopyLane>> CopyLane::Create() {
  std::unique_ptr<CopyLane> lane(new CopyLane);
  KVRELAY_RETURN_IF_ERROR(CudaStatus(cudaGetDevice(&lane->device_), "the current device"));
  int least = 0;
  int greatest = 0;
  KVRELAY_RETURN_IF_ERROR(
      CudaStatus(cudaDeviceGetStreamPriorityRange(&least, &greatest), "stream priorities"));
  KVRELAY_RETURN_IF_ERROR(
      CudaStatus(cudaStreamCreateWithPriority(&lane->stream_, cudaStreamNonBlocking, greatest),
                 "creating a stream"));
  KVRELAY_RETURN_IF_ERROR(lane->MakeRoom(kLeastTables));
  void* memory = nullptr;
  KVRELAY_RETURN_IF_ERROR(
      CudaStatus(cudaHostAlloc(&memory, sizeof(*lane->word_), cudaHostAllocMapped), "a word"));
  lane->word_ = new (memory) std::atomic<uint32_t>(0);
  KVRELAY_RETURN_IF_ERROR(CudaStatus(cudaHostGetDevicePointer(&memory, lane->word_, 0), "a word"));
  lane->word_at_ = static_cast<uint32_t*>(memory);
  KVRELAY_RETURN_IF_ERROR(CudaStatus(cudaMalloc(&memory, sizeof(uint32_t)), "a counter"));
  lane->arrived_ = static_cast<uint32_t*>(memory);
  KVRELAY_RETURN_IF_ERROR(
      CudaStatus(cudaMemsetAsync(lane->arrived_, 0, sizeof(uint32_t), lane->stream_), "a counter"));
  return lane;
}

CopyLane::~CopyLane() {
  if (tables_ != nullptr) cudaFreeAsync(tables_, stream_);
  cudaFree(arrived_);
  cudaFreeHost(word_);
  if (stream_ != nullptr) cudaStreamDestroy(stream_);
}

Status CopyLane::MakeRoom(size_t bytes) {
  if (bytes <= table_bytes_) return {};
  // In the stream's order: cudaFree would wait for all that the device does.
  if (tables_ != nullptr) cudaFreeAsync(tables_, stream_);
  tables_ = nullptr;
  table_bytes_ = 0;
  const size_t room = std::bit_ceil(bytes);
  KVRELAY_RETURN_IF_ERROR(
      CudaStatus(cudaMallocAsync(&tables_, room, stream_), "room for a copy plan"));
  table_bytes_ = room;
  return {};
}

Status CopyLane::Start(GatherCuda& gather) {
  ++value_;
  ask_at_ = std::chrono::steady_clock::now() + kAskEvery;
  if (gather.empty()) {
    word_->store(value_, std::memory_order_relaxed);
    return {};
  }
  KVRELAY_RETURN_IF_ERROR(MakeRoom(gather.table_bytes()));
  KVRELAY_RETURN_IF_ERROR(gather.Upload(tables_, stream_));
  gather.SayEnd({.arrived = arrived_, .word = word_at_, .value = value_});
  return gather.Launch(stream_);
}

Status CopyLane::Start(std::span<const LongRun> runs) {
  ++value_;
  ask_at_ = {};  // the copy engine does not say its end
#if CUDART_VERSION >= 13000
  // In a batch a copy does not wait for the one before it: 3 us a copy less.
  std::vector<const void*> from;
  std::vector<void*> to;
  std::vector<size_t> bytes;
  for (const LongRun& run : runs) {
    from.push_back(run.src);
    to.push_back(run.dst);
    bytes.push_back(run.bytes);
  }
  cudaMemcpyAttributes attributes = {};
  attributes.srcAccessOrder = cudaMemcpySrcAccessOrderStream;
  size_t first = 0;
  return CudaStatus(cudaMemcpyBatchAsync(to.data(), from.data(), bytes.data(), bytes.size(),
                                         &attributes, &first, 1, stream_),
                    "copying long runs");
#else
  for (const LongRun& run : runs) {
    KVRELAY_RETURN_IF_ERROR(
        CudaStatus(cudaMemcpyAsync(run.dst, run.src, run.bytes, cudaMemcpyDefault, stream_),
                   "copying a long run"));
  }
  return {};
#endif
}

std::optional<Status> CopyLane::Ended() {
  if (word_->load(std::memory_order_acquire) == value_) return Status::Ok();
  if (ask_at_ == TimePoint()) return AskDevice();
  const TimePoint now = std::chrono::steady_clock::now();
  if (now < ask_at_) return std::nullopt;
  ask_at_ = now + kAskEvery;
  std::optional<Status> ended = AskDevice();
  if (ended && ended->ok() && word_->load(std::memory_order_acquire) != value_) {
    return Status(Code::kInternal, "a gather: the device did not say its end");
  }
  return ended;
}

std::optional<Status> CopyLane::AskDevice() {
  cudaSetDevice(device_);
  const cudaError_t error = cudaStreamQuery(stream_);
  if (error == cudaErrorNotReady) return std::nullopt;
  return CudaStatus(error, "a gather");
}

void CopyLane::Wait() const { cudaStreamSynchronize(stream_); }

}  // namespace kvrelay::cuda
