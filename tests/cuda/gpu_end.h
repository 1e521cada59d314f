// One end of a transfer on a machine with a GPU: KV there or on the host, lease records on the
// host, and a transport between them and the other end.
#pragma once

#include <cuda_runtime_api.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <chrono>
#include <functional>
#include <future>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "attention/cuda/device_array.h"
#include "kvcache/device.h"
#include "kvcache/lease_record.h"
#include "transport/transport.h"

namespace kvrelay::cuda {

struct GpuEnd {
  static constexpr RegionId kRecords = 1;

  // `device`: of the KV; null: the host.
  GpuEnd(std::shared_ptr<Device> of, uint64_t bytes, const std::string& run_dir, Incarnation is,
         const std::string& transport = "mapped")
      : GpuEnd(of,
               (of == nullptr ? Region::AllocateHost(bytes, "test-kv")
                              : of->Allocate(bytes, "test-kv"))
                   .value(),
               run_dir, is, transport) {}
  GpuEnd(std::shared_ptr<Device> of, Region region, const std::string& run_dir, Incarnation is,
         const std::string& transport = "mapped")
      : device(std::move(of)),
        kv(std::move(region)),
        records(Region::AllocateHost(4096, "test-records").value()),
        incarnation(is) {
    transport::Options options;
    options.regions = {transport::LocalRegion::Of(kv), transport::LocalRegion::Of(records)};
    options.device = device;
    options.executor = [](const std::function<void()>& fn) { fn(); };
    options.run_dir = run_dir;
    options.incarnation = incarnation;
    options.rails = 1;  // callbacks come from one thread, without a control thread
    const auto kind =
        std::ranges::find(transport::TransportKinds(), transport, &transport::TransportKind::name);
    way = kind->create(options).value();
  }
  LeaseRecord& record() const { return *reinterpret_cast<LeaseRecord*>(records.data()); }
  transport::PeerSpec Spec() const {
    return {.name = "peer",
            .address = way->LocalAddress(),
            .region_bytes = {kv.bytes(), records.bytes()},
            .incarnation = incarnation};
  }
  Result<transport::PeerHandle> Connect(
      const transport::PeerSpec& peer, std::function<void()> on_death = [] {}) const {
    std::promise<Result<transport::PeerHandle>> connected;
    way->Connect(
        peer, std::chrono::steady_clock::now() + std::chrono::seconds(20),
        [&](Result<transport::PeerHandle> handle) { connected.set_value(std::move(handle)); },
        std::move(on_death));
    return connected.get_future().get();
  }
  void Set(const std::vector<std::byte>& bytes) const {
    KVRELAY_CUDA(cudaMemcpy(kv.data(), bytes.data(), bytes.size(), cudaMemcpyDefault));
    KVRELAY_CUDA(cudaDeviceSynchronize());
  }
  std::vector<std::byte> Get() const {
    std::vector<std::byte> bytes(kv.bytes());
    KVRELAY_CUDA(cudaMemcpy(bytes.data(), kv.data(), bytes.size(), cudaMemcpyDefault));
    return bytes;
  }

  const std::shared_ptr<Device> device;
  const Region kv;
  const Region records;
  const Incarnation incarnation;
  std::unique_ptr<transport::Transport> way;
};

}  // namespace kvrelay::cuda
