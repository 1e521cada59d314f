#include "kvcache/cuda/copy_lane.h"

#include <bit>

#include "kvcache/cuda/cuda_status.h"

namespace kvrelay::cuda {
namespace {

constexpr size_t kLeastTables = 64 << 10;
// What a kernel reads from the host's memory in less time than it takes to order an upload.
constexpr size_t kSmallTables = 2 << 10;

}  // namespace

Result<std::unique_ptr<CopyLane>> CopyLane::Create() {
  std::unique_ptr<CopyLane> lane(new CopyLane);
  int least = 0;
  int greatest = 0;
  KVRELAY_RETURN_IF_ERROR(
      CudaStatus(cudaDeviceGetStreamPriorityRange(&least, &greatest), "stream priorities"));
  KVRELAY_RETURN_IF_ERROR(
      CudaStatus(cudaStreamCreateWithPriority(&lane->stream_, cudaStreamNonBlocking, greatest),
                 "creating a stream"));
  KVRELAY_RETURN_IF_ERROR(CudaStatus(
      cudaEventCreateWithFlags(&lane->ended_, cudaEventDisableTiming), "creating an event"));
  KVRELAY_RETURN_IF_ERROR(lane->MakeRoom(kLeastTables));
  KVRELAY_RETURN_IF_ERROR(CudaStatus(
      cudaHostAlloc(&lane->small_tables_, kSmallTables, cudaHostAllocMapped), "pinned memory"));
  KVRELAY_RETURN_IF_ERROR(CudaStatus(
      cudaHostGetDevicePointer(&lane->small_at_, lane->small_tables_, 0), "pinned memory"));
  return lane;
}

CopyLane::~CopyLane() {
  if (tables_ != nullptr) cudaFreeAsync(tables_, stream_);
  cudaFreeHost(small_tables_);
  if (ended_ != nullptr) cudaEventDestroy(ended_);
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
  if (gather.table_bytes() <= kSmallTables) {
    gather.Write(small_tables_, small_at_);
  } else {
    KVRELAY_RETURN_IF_ERROR(MakeRoom(gather.table_bytes()));
    KVRELAY_RETURN_IF_ERROR(gather.Upload(tables_, stream_));
  }
  KVRELAY_RETURN_IF_ERROR(gather.Launch(stream_));
  return CudaStatus(cudaEventRecord(ended_, stream_), "recording the end of a gather");
}

std::optional<Status> CopyLane::Ended() const {
  const cudaError_t error = cudaEventQuery(ended_);
  if (error == cudaErrorNotReady) return std::nullopt;
  return CudaStatus(error, "a gather");
}

void CopyLane::Wait() const { cudaStreamSynchronize(stream_); }

}  // namespace kvrelay::cuda
