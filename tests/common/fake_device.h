// A Device without a GPU: its memory is the host's, its copies end when the test lets them, and
// they reach what a GPU's would and nothing else.
#pragma once

#include <sys/mman.h>

#include <atomic>
#include <chrono>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "base/mapping.h"
#include "kvcache/copy_host.h"
#include "kvcache/device.h"
#include "kvcache/memfd.h"

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
  // While it holds, Map does not return.
  void HoldMapping() { mapping_held_ = true; }
  void LetGoMapping() { mapping_held_ = false; }
  // From here on Pin refuses.
  void RefuseToPin() { pins_ = false; }
  uint64_t begun() const { return begun_; }
  uint64_t ended() const { return ended_; }
  size_t mapped() const { return mapped_; }  // of peers' regions
  size_t pinned() const {
    const std::lock_guard lock(mutex_);
    return pinned_.size();
  }

  // The host's memory plays the device's.
  void Adopt(const std::byte* data, uint64_t bytes) {
    const std::lock_guard lock(mutex_);
    memory_[data] = {bytes, const_cast<std::byte*>(data)};
  }
  // Its memory, allocated and mapped, can be touched by the host: the test looks, or fills it. Else
  // a touch ends the test.
  void LetHostTouch(bool may) {
    const std::lock_guard lock(mutex_);
    for (const auto& [data, memory] : memory_) {
      if (memory.at == data) continue;
      ::mprotect(const_cast<std::byte*>(data), memory.bytes,
                 may ? PROT_READ | PROT_WRITE : PROT_NONE);
    }
  }

  const std::string& name() const override { return name_; }

  Result<Region> Allocate(uint64_t bytes, const std::string& name) override {
    if (bytes == 0) return Error(Code::kInvalidArgument, "region " + name + " of 0 bytes");
    KVRELAY_ASSIGN_OR_RETURN(const UniqueFd fd, MakeMemfd(bytes, name));
    auto both = std::make_shared<Both>(*this);
    for (Mapping* mapping : {&both->hosts, &both->ours}) {
      KVRELAY_ASSIGN_OR_RETURN(*mapping,
                               Mapping::Map(bytes, PROT_READ | PROT_WRITE, MAP_SHARED, fd.get()));
    }
    KVRELAY_RETURN_IF_ERROR(SealMemfd(fd.get(), Sealed::kSizeAndPages));
    KVRELAY_ASSIGN_OR_RETURN(UniqueFd exported, ReopenReadOnly(fd.get()));
    std::byte* const data = both->hosts.data();
    Remember(data, bytes, both->ours.data());
    return Region::Own(std::move(both), data, bytes, std::move(exported),
                       {.kind = DeviceKind::kCuda, .device = name_, .exported = "memfd"}, name);
  }

  Result<Region> Register(std::byte*, uint64_t, const std::string& name) override {
    return Error(Code::kInvalidArgument, "region " + name + " is no memory of " + name_);
  }

  Result<std::unique_ptr<DeviceMapping>> Map(UniqueFd fd, uint64_t bytes) override {
    while (mapping_held_) std::this_thread::sleep_for(std::chrono::microseconds(100));
    KVRELAY_ASSIGN_OR_RETURN(MappedRegion region, MappedRegion::Map(std::move(fd), bytes));
    auto mapping = std::make_unique<Mapped>(*this, std::move(region));
    Remember(mapping->data(), bytes, const_cast<std::byte*>(mapping->data()));
    return mapping;
  }

  Result<std::unique_ptr<PinnedHost>> Pin(std::span<const std::byte> memory, HostAccess) override {
    if (!pins_) return Error(Code::kRefused, name_ + " cannot pin memory of the host");
    const std::lock_guard lock(mutex_);
    pinned_[memory.data()] = memory.size();
    return std::make_unique<Pinned>(*this, memory.data());
  }

  Result<std::unique_ptr<DeviceCopy>> Copy(const CopyPlan& plan,
                                           std::span<const std::byte* const> src_regions,
                                           std::span<std::byte* const> dst_regions) override {
    auto copy = std::make_unique<Under>(*this);
    copy->plan = plan;
    copy->src.resize(src_regions.size());
    copy->dst.resize(dst_regions.size());
    const std::lock_guard lock(mutex_);
    for (const CopyPlace& place : plan.places) {
      const std::byte*& src = copy->src[place.src_region] = Reach(src_regions[place.src_region]);
      std::byte*& dst = copy->dst[place.dst_region] = Reach(dst_regions[place.dst_region]);
      if (src == nullptr || dst == nullptr) {
        return Error(Code::kInternal, name_ + ": an illegal memory access");
      }
    }
    copy->failure = std::exchange(failure_, {});
    ++begun_;
    return copy;
  }

 private:
  struct Memory {
    uint64_t bytes = 0;
    std::byte* at = nullptr;  // where this class sees it
  };
  // One region, as the host and as this class sees it.
  struct Both {
    explicit Both(FakeDevice& of) : device(of) {}
    ~Both() { device.Forget(hosts.data()); }
    FakeDevice& device;
    Mapping hosts;
    Mapping ours;
  };
  struct Mapped final : DeviceMapping {
    Mapped(FakeDevice& of, MappedRegion mapped) : device(of), region(std::move(mapped)) {
      ++device.mapped_;
    }
    ~Mapped() override {
      device.Forget(region.data());
      --device.mapped_;
    }
    const std::byte* data() const override { return region.data(); }
    FakeDevice& device;
    MappedRegion region;
  };
  struct Pinned final : PinnedHost {
    Pinned(FakeDevice& of, const std::byte* data) : device(of), at(data) {}
    ~Pinned() override {
      const std::lock_guard lock(device.mutex_);
      device.pinned_.erase(at);
    }
    FakeDevice& device;
    const std::byte* const at;
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

  void Remember(const std::byte* data, uint64_t bytes, std::byte* at) {
    const std::lock_guard lock(mutex_);
    memory_[data] = {bytes, at};
  }
  void Forget(const std::byte* data) {
    const std::lock_guard lock(mutex_);
    memory_.erase(data);
  }
  // Under the mutex. Null: a copy does not reach this address.
  std::byte* Reach(const std::byte* at) const {
    const auto memory = memory_.upper_bound(at);
    if (memory != memory_.begin()) {
      const auto& [data, known] = *std::prev(memory);
      if (at < data + known.bytes) return known.at + (at - data);
    }
    const auto pinned = pinned_.upper_bound(at);
    if (pinned == pinned_.begin()) return nullptr;
    const auto& [data, bytes] = *std::prev(pinned);
    return at < data + bytes ? const_cast<std::byte*>(at) : nullptr;
  }

  const std::string name_ = "fake:0";
  std::atomic<bool> held_ = false;
  std::atomic<bool> mapping_held_ = false;
  std::atomic<bool> pins_ = true;
  std::atomic<size_t> mapped_ = 0;
  std::atomic<uint64_t> begun_ = 0;
  std::atomic<uint64_t> ended_ = 0;
  mutable std::mutex mutex_;
  // Under the mutex.
  Status failure_;
  std::map<const std::byte*, Memory, std::less<>> memory_;  // its own and its mappings
  std::map<const std::byte*, uint64_t, std::less<>> pinned_;
};

}  // namespace kvrelay::tests
