// Host memory in the shape of a cache that the network cannot reach: prefill copies what it
// computed there and offers it from there, decode receives there and copies it to its device. The
// copy functions are the user's.
//
// The names of the field: initialize_host_xfer_buffer, set_host_xfer_buffer_ops, save_kv_to_host,
// sync_recved_kv_to_device.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <span>
#include <vector>

#include "agent/rank_agent.h"
#include "kvcache/block_pool.h"
#include "kvcache/region.h"

namespace kvrelay::agent {

// One rank's part of the buffer, as a copy function sees it: block b of the device's cache has the
// same id here. `layout` is the device's as far as strides go; regions by RegionId.
struct HostXferRank {
  uint32_t rank = 0;
  const KvLayout& layout;
  std::vector<std::byte*> regions;
};

// Copies these blocks, all layers, K and V. Returns when the bytes have arrived: readers may see
// them, or kernels that are started from now on. On the thread that asked for it.
using CopyBlocks = std::function<Status(const HostXferRank& host, std::span<const BlockId> blocks)>;
struct HostXferOps {
  CopyBlocks d2h;
  CopyBlocks h2d;
};

// Any thread, once the ops are set. Outlives the agent whose caches it holds.
class HostXferBuffer {
 public:
  // What a rank's device holds; `region_bytes` by RegionId.
  struct DeviceCache {
    KvLayout layout;
    KvShard shard;
    std::vector<uint64_t> region_bytes;
  };
  // Takes host memory for all of `caches` (by rank), in the same layout: kInvalidArgument for a
  // layout that leaves its regions or has several kinds of layers, kResourceExhausted for no
  // memory.
  static Result<std::unique_ptr<HostXferBuffer>> Initialize(std::vector<DeviceCache> caches);

  // What to register, with EngineAgent::Create, in place of the device's caches.
  const std::vector<RankCache>& caches() const { return caches_; }
  // Before the first copy.
  void SetOps(HostXferOps ops) { ops_ = std::move(ops); }

  // Device to host, on every rank. Before the progress of these blocks is published.
  Status SaveKvToHost(std::span<const BlockId> blocks) const { return Copy(ops_.d2h, blocks); }
  // Host to device, on every rank.
  Status SyncRecvedKvToDevice(std::span<const BlockId> blocks) const {
    return Copy(ops_.h2d, blocks);
  }

 private:
  HostXferBuffer() = default;
  Status Copy(const CopyBlocks& op, std::span<const BlockId> blocks) const;

  std::vector<std::unique_ptr<Region>> regions_;
  std::vector<RankCache> caches_;
  HostXferOps ops_;
};

}  // namespace kvrelay::agent
