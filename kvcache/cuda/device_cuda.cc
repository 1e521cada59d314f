#include "kvcache/cuda/device_cuda.h"

#include <cuda_runtime_api.h>

#include <algorithm>
#include <functional>
#include <iterator>
#include <map>
#include <mutex>
#include <string>
#include <utility>
#include <vector>

#include "kvcache/cuda/copy_lane.h"
#include "kvcache/cuda/cuda_status.h"
#include "kvcache/cuda/driver.h"
#include "kvcache/cuda/memory_cuda.h"
#include "kvcache/cuda/users_memory.h"

namespace kvrelay::cuda {
namespace {

// Two fill the way to the host in both directions (52 and 51 of the copy engine's 55 GB/s from
// slices of 256 bytes on), one reaches 42 and 34.
constexpr uint32_t kSmsForHost = 4;

class MappingCuda final : public DeviceMapping {
 public:
  explicit MappingCuda(std::shared_ptr<const MemoryCuda> memory) : memory_(std::move(memory)) {}
  const std::byte* data() const override { return memory_->data(); }

 private:
  const std::shared_ptr<const MemoryCuda> memory_;
};

// Spans of the host's memory that the device reaches.
class Pins {
 public:
  void Add(std::span<const std::byte> memory) {
    const std::lock_guard lock(mutex_);
    spans_.emplace(memory.data(), memory.size());
  }
  void Remove(const std::byte* data) {
    const std::lock_guard lock(mutex_);
    spans_.erase(data);
  }
  bool Hold(const std::byte* at) const {
    const std::lock_guard lock(mutex_);
    const auto next = spans_.upper_bound(at);
    return next != spans_.begin() && at < std::prev(next)->first + std::prev(next)->second;
  }

 private:
  mutable std::mutex mutex_;
  std::map<const std::byte*, uint64_t, std::less<>> spans_;
};

class PinnedCuda final : public PinnedHost {
 public:
  PinnedCuda(int ordinal, Pins& pins, std::span<const std::byte> memory)
      : ordinal_(ordinal), pins_(pins), at_(memory.data()) {
    pins_.Add(memory);
  }
  ~PinnedCuda() override {
    pins_.Remove(at_);
    cudaSetDevice(ordinal_);
    cudaHostUnregister(const_cast<std::byte*>(at_));
  }

 private:
  const int ordinal_;
  Pins& pins_;
  const std::byte* const at_;
};

// Lanes that nobody uses.
class Lanes {
 public:
  Result<std::unique_ptr<CopyLane>> Take() {
    {
      const std::lock_guard lock(mutex_);
      if (!idle_.empty()) {
        std::unique_ptr<CopyLane> lane = std::move(idle_.back());
        idle_.pop_back();
        return lane;
      }
    }
    return CopyLane::Create();
  }
  void Give(std::unique_ptr<CopyLane> lane) {
    const std::lock_guard lock(mutex_);
    idle_.push_back(std::move(lane));
  }

 private:
  std::mutex mutex_;
  std::vector<std::unique_ptr<CopyLane>> idle_;
};

class CopyCuda final : public DeviceCopy {
 public:
  CopyCuda(int ordinal, Lanes& lanes, std::unique_ptr<CopyLane> lane)
      : ordinal_(ordinal), lanes_(lanes), lane_(std::move(lane)) {}
  ~CopyCuda() override {
    if (!Ended()) {
      cudaSetDevice(ordinal_);
      lane_->Wait();
    }
    lanes_.Give(std::move(lane_));
  }
  std::optional<Status> Ended() override {
    if (!ended_) ended_ = lane_->Ended();
    return ended_;
  }

 private:
  const int ordinal_;
  Lanes& lanes_;
  std::unique_ptr<CopyLane> lane_;
  std::optional<Status> ended_;
};

class DeviceCuda final : public Device {
 public:
  DeviceCuda(int ordinal, const GatherOptions& options, const Driver& driver)
      : ordinal_(ordinal),
        name_("cuda:" + std::to_string(ordinal)),
        options_(options),
        driver_(driver) {}

  // The first of each thing costs milliseconds in CUDA: here, and not in a pull.
  Status WarmUp() {
    CopyPlan plan;
    plan.boxes.resize(1);
    plan.boxes[0].run_bytes = 16;
    plan.boxes[0].num_places = 1;
    plan.boxes[0].num_segments = 1;
    plan.places = {{0, 0, 0, 16}};
    plan.segments = {{0, 0}};
    void* memory = nullptr;
    KVRELAY_RETURN_IF_ERROR(CudaStatus(cudaMalloc(&memory, 32), "the first memory on " + name_));
    auto* const bytes = static_cast<std::byte*>(memory);
    Status status;
    if (const auto copy =
            Copy(plan, std::vector<const std::byte*>{bytes}, std::vector<std::byte*>{bytes});
        !copy.has_value()) {
      status = copy.error();
    }
    cudaFree(memory);
    return status;
  }

  const std::string& name() const override { return name_; }

  Result<Region> Allocate(uint64_t bytes, const std::string& name) override {
    if (bytes == 0) return Error(Code::kInvalidArgument, "region " + name + " of 0 bytes");
    KVRELAY_RETURN_IF_ERROR(MakeCurrent());
    auto allocated = MemoryCuda::Allocate(driver_, ordinal_, bytes);
    if (!allocated.has_value()) return Error(allocated.error().Wrap("region " + name));
    std::byte* const data = allocated->memory->data();
    KVRELAY_RETURN_IF_ERROR(CudaStatus(cudaMemset(data, 0, bytes), "zeroing a region"));
    KVRELAY_RETURN_IF_ERROR(CudaStatus(cudaDeviceSynchronize(), "zeroing a region"));
    std::string exported = "CUDA virtual memory";
    if (allocated->extras.fabric) exported += ", FABRIC";
    if (allocated->extras.rdma) exported += ", GPUDirect RDMA";
    return Region::Own(std::move(allocated->memory), data, bytes, std::move(allocated->fd),
                       PlaceOf(std::move(exported)), name);
  }

  Result<Region> Register(std::byte* data, uint64_t bytes, const std::string& name) override {
    KVRELAY_RETURN_IF_ERROR(MakeCurrent());
    auto exported = ExportUsersMemory(driver_, ordinal_, data, bytes);
    if (!exported.has_value()) return Error(exported.error().Wrap("region " + name));
    return Region::Own(nullptr, data, bytes, std::move(exported->fd),
                       PlaceOf(std::move(exported->exported)), name);
  }

  Result<std::unique_ptr<DeviceMapping>> Map(UniqueFd fd, uint64_t bytes) override {
    KVRELAY_RETURN_IF_ERROR(MakeCurrent());
    if (HoldsIpcHandle(fd.get())) return MapIpcHandle(driver_, ordinal_, fd.get(), bytes);
    KVRELAY_ASSIGN_OR_RETURN(std::shared_ptr<const MemoryCuda> memory,
                             MemoryCuda::Import(driver_, ordinal_, std::move(fd), bytes));
    return std::make_unique<MappingCuda>(std::move(memory));
  }

  Result<std::unique_ptr<PinnedHost>> Pin(std::span<const std::byte> memory,
                                          HostAccess access) override {
    KVRELAY_RETURN_IF_ERROR(MakeCurrent());
    auto* const at = const_cast<std::byte*>(memory.data());
    unsigned flags = cudaHostRegisterMapped | cudaHostRegisterPortable;
    if (access == HostAccess::kRead) flags |= cudaHostRegisterReadOnly;
    if (const cudaError_t error = cudaHostRegister(at, memory.size(), flags);
        error != cudaSuccess) {
      (void)cudaGetLastError();
      return Error(Code::kRefused, name_ + " cannot pin " + std::to_string(memory.size()) +
                                       " bytes of the host: " + cudaGetErrorString(error));
    }
    auto pinned = std::make_unique<PinnedCuda>(ordinal_, pins_, memory);
    void* seen = nullptr;
    if (cudaHostGetDevicePointer(&seen, at, 0) != cudaSuccess || seen != at) {
      return Error(Code::kRefused, name_ + " sees the host's memory at other addresses");
    }
    return pinned;
  }

  Result<std::unique_ptr<DeviceCopy>> Copy(const CopyPlan& plan,
                                           std::span<const std::byte* const> src_regions,
                                           std::span<std::byte* const> dst_regions) override {
    KVRELAY_RETURN_IF_ERROR(MakeCurrent());
    if (const auto runs = LongRuns(plan, src_regions, dst_regions, kLongRunFromPeer);
        runs && EngineIsFaster(plan.bytes(), *runs)) {
      return Begin([&](CopyLane& lane) { return lane.Start(*runs); });
    }
    KVRELAY_ASSIGN_OR_RETURN(GatherCuda gather,
                             GatherCuda::Make(plan, src_regions, dst_regions,
                                              OptionsFor(plan, src_regions, dst_regions)));
    return Begin([&](CopyLane& lane) { return lane.Start(gather); });
  }

 private:
  // The runs are long enough for a peer's memory, and the host's.
  bool EngineIsFaster(uint64_t bytes, const std::vector<LongRun>& runs) const {
    if (runs.empty()) return false;
    if (pins_.Hold(runs.front().src)) return true;
    cudaPointerAttributes src{};
    if (cudaPointerGetAttributes(&src, runs.front().src) != cudaSuccess) return false;
    return src.device != ordinal_ ||
           (options_.max_sms <= kSmsBelowEngine && bytes / runs.size() >= kLongRunWithin);
  }

  GatherOptions OptionsFor(const CopyPlan& plan, std::span<const std::byte* const> src_regions,
                           std::span<std::byte* const> dst_regions) const {
    GatherOptions options = options_;
    if (plan.places.empty()) return options;
    if (pins_.Hold(src_regions[plan.places[0].src_region]) ||
        pins_.Hold(dst_regions[plan.places[0].dst_region])) {
      options.max_sms = std::min(options.max_sms, kSmsForHost);
    }
    return options;
  }

  template <typename Start>
  Result<std::unique_ptr<DeviceCopy>> Begin(Start start) {
    KVRELAY_ASSIGN_OR_RETURN(std::unique_ptr<CopyLane> lane, lanes_.Take());
    if (Status status = start(*lane); !status.ok()) {
      lane->Wait();
      lanes_.Give(std::move(lane));
      return Error(std::move(status));
    }
    return std::make_unique<CopyCuda>(ordinal_, lanes_, std::move(lane));
  }

  Region::Place PlaceOf(std::string exported) const {
    return {.kind = DeviceKind::kCuda, .device = name_, .exported = std::move(exported)};
  }

  Status MakeCurrent() const { return CudaStatus(cudaSetDevice(ordinal_), name_); }

  const int ordinal_;
  const std::string name_;
  const GatherOptions options_;
  const Driver driver_;
  Pins pins_;
  Lanes lanes_;
};

}  // namespace

Result<std::shared_ptr<Device>> OpenDevice(int ordinal, const GatherOptions& options) {
  int count = 0;
  const cudaError_t error = cudaGetDeviceCount(&count);
  if (error != cudaSuccess || ordinal < 0 || ordinal >= count) {
    return Error(Code::kInvalidArgument,
                 "there is no cuda:" + std::to_string(ordinal) + " here: " +
                     (error == cudaSuccess ? std::to_string(count) + " GPUs are visible"
                                           : std::string(cudaGetErrorString(error))));
  }
  KVRELAY_RETURN_IF_ERROR(CudaStatus(cudaSetDevice(ordinal), "choosing a GPU"));
  KVRELAY_ASSIGN_OR_RETURN(const Driver driver, Driver::Find());
  auto device = std::make_shared<DeviceCuda>(ordinal, options, driver);
  KVRELAY_RETURN_IF_ERROR(device->WarmUp());
  return device;
}

}  // namespace kvrelay::cuda
