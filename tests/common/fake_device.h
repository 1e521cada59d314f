// A Device without a GPU: its memory is the host's, its copies end when the test lets them.
#pragma once

#include <atomic>
#include <chrono>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "kvcache/copy_host.h"
#include "kvcache/device.h"

namespace kvrelay::tests {

class FakeDevice final : public Device {
 public:
  // While it holds, copies that were begun move nothing and do not end.
  void Hold() { held_ = true; }
  void LetGo() { held_ = false; }
  // The next copy moves nothing and fails with this.
  void FailNext(Status status) {
    const std::lock_guard lock(mutex_);
    failure_ = std::move(status);
  }
  uint64_t begun() const { return begun_; }
  uint64_t ended() const { return ended_; }

  const std::string& name() const override { return name_; }

  Result<Region> Allocate(uint64_t bytes, const std::string& name) override {
    KVRELAY_ASSIGN_OR_RETURN(Region host, Region::AllocateHost(bytes, name));
    UniqueFd fd(::dup(host.export_fd()));
    std::byte* const data = host.data();
    return Region::Own(std::make_shared<Region>(std::move(host)), data, bytes, std::move(fd),
                       {.kind = DeviceKind::kCuda, .device = name_, .exported = "memfd"}, name);
  }

  Result<std::unique_ptr<DeviceMapping>> Map(UniqueFd fd, uint64_t bytes) override {
    KVRELAY_ASSIGN_OR_RETURN(MappedRegion region, MappedRegion::Map(std::move(fd), bytes));
    return std::make_unique<Mapping>(std::move(region));
  }

  Result<std::unique_ptr<DeviceCopy>> Copy(const CopyPlan& plan,
                                           std::span<const std::byte* const> src_regions,
                                           std::span<std::byte* const> dst_regions) override {
    auto copy = std::make_unique<Under>(*this);
    copy->plan = plan;
    copy->src.assign(src_regions.begin(), src_regions.end());
    copy->dst.assign(dst_regions.begin(), dst_regions.end());
    {
      const std::lock_guard lock(mutex_);
      copy->failure = std::exchange(failure_, {});
    }
    ++begun_;
    return copy;
  }

 private:
  struct Mapping final : DeviceMapping {
    explicit Mapping(MappedRegion mapped) : region(std::move(mapped)) {}
    const std::byte* data() const override { return region.data(); }
    MappedRegion region;
  };
  struct Under final : DeviceCopy {
    explicit Under(FakeDevice& of) : device(of) {}
    ~Under() override {
      while (!Ended()) std::this_thread::sleep_for(std::chrono::microseconds(100));
    }
    std::optional<Status> Ended() override {
      if (over) return failure;
      if (device.held_) return std::nullopt;
      over = true;
      if (failure.ok()) ExecuteCopy(plan, src, dst);
      ++device.ended_;
      return failure;
    }
    FakeDevice& device;
    CopyPlan plan;
    std::vector<const std::byte*> src;
    std::vector<std::byte*> dst;
    Status failure;
    bool over = false;
  };

  const std::string name_ = "fake:0";
  std::atomic<bool> held_ = false;
  std::atomic<uint64_t> begun_ = 0;
  std::atomic<uint64_t> ended_ = 0;
  std::mutex mutex_;
  Status failure_;  // under the mutex
};

}  // namespace kvrelay::tests
