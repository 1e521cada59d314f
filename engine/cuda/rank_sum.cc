#include "engine/cuda/rank_sum.h"

#include <string>

#include "engine/cuda/kernels.h"

namespace kvrelay::engine::cuda {
namespace {

Status EnablePeer(int from, int to) {
  if (from == to) return Status::Ok();
  const std::string both = "cuda:" + std::to_string(from) + " and cuda:" + std::to_string(to);
  int can = 0;
  KVRELAY_RETURN_IF_ERROR(CudaStatus(cudaDeviceCanAccessPeer(&can, from, to), both));
  if (can == 0) {
    return {Code::kIncompatible, both +
                                     " cannot read each other's memory: tensor parallel ranks "
                                     "need peer access"};
  }
  KVRELAY_RETURN_IF_ERROR(CudaStatus(cudaSetDevice(from), both));
  const cudaError_t error = cudaDeviceEnablePeerAccess(to, 0);
  if (error == cudaErrorPeerAccessAlreadyEnabled) {
    cudaGetLastError();  // or the next launch would report it
    return Status::Ok();
  }
  return CudaStatus(error, "peer access between " + both);
}

}  // namespace

Result<std::shared_ptr<RankSum>> RankSum::Create(TpGroup& group, std::span<const int> ordinals) {
  if (group.size() > kMaxPeers) {
    return Error(Code::kInvalidArgument, "tp = " + std::to_string(group.size()) +
                                             ": GPUs of one process add up at most " +
                                             std::to_string(kMaxPeers) + " ranks");
  }
  for (const int from : ordinals) {
    for (const int to : ordinals) KVRELAY_RETURN_IF_ERROR(EnablePeer(from, to));
  }
  return std::shared_ptr<RankSum>(new RankSum(group));
}

Status RankSum::Join(uint32_t rank, size_t count) {
  for (uint32_t turn = 0; turn < 2; ++turn) {
    KVRELAY_ASSIGN_OR_RETURN(ranks_[rank].parts[turn],
                             AllocateDevice<float>(count, "the ranks' parts"));
    KVRELAY_ASSIGN_OR_RETURN(ranks_[rank].written[turn], MakeEvent());
  }
  return Status::Ok();
}

Status RankSum::Add(uint32_t rank, size_t count, float* x, cudaStream_t stream) {
  const uint32_t turn = ranks_[rank].turn;
  KVRELAY_RETURN_IF_ERROR(
      CudaStatus(cudaEventRecord(ranks_[rank].written[turn].get(), stream), "a rank's part"));
  // All events are recorded before any is waited for.
  KVRELAY_RETURN_IF_ERROR(group_.Meet());
  Parts parts;
  for (const Rank& other : ranks_) {
    KVRELAY_RETURN_IF_ERROR(
        CudaStatus(cudaStreamWaitEvent(stream, other.written[turn].get(), 0), "the ranks' parts"));
    parts.of_rank[parts.ranks++] = other.parts[turn].get();
  }
  ranks_[rank].turn = 1 - turn;
  return AddParts(parts, count, x, stream);
}

}  // namespace kvrelay::engine::cuda
