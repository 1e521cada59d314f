// Daemons on two hosts with a cable between them: far apart, and every byte that crosses is
// counted.
#pragma once

#include <memory>
#include <optional>

#include "tests/common/cable.h"
#include "tests/common/isolated_host.h"
#include "tests/integration/failure_story.h"

namespace kvrelay::integration {

// Skipped where the system does not allow it. Look() and its like reach no daemon from outside:
// stories ask by commands (Inspect), which LaunchBy sends to the right host.
class TwoHosts : public FailureStory {
 protected:
  void SetUp() override {
    here_ = IsolatedHost::Create();
    there_ = IsolatedHost::Create();
    if (!here_ || !there_ || !Connect()) {
      GTEST_SKIP() << "no right to make namespaces or interfaces here, or no ip or nsenter command";
    }
  }
  // What the cable is like; nothing: as fast as it can.
  virtual std::optional<CableShape> Shape() const { return std::nullopt; }

  const IsolatedHost& here() const { return *here_; }
  const IsolatedHost& there() const { return *there_; }
  // Of a shaped one. Its left end is there.
  const Cable& cable() const { return *cable_; }
  // Over the cable, on this side of it.
  uint64_t Arrived() const { return here_->ReceivedBytes("kvtest1"); }

  // Flags of a daemon on each, with a run folder that only its host sees.
  static Args Here(Args more = {}) { return At("10.213.7.2", "kvtest1", std::move(more)); }
  static Args There(Args more = {}) { return At("10.213.7.1", "kvtest0", std::move(more)); }

 private:
  bool Connect() {
    const std::optional<CableShape> shape = Shape();
    if (!shape) return there_->Join(*here_);
    cable_ = Cable::Lay(*there_, *here_, *shape);
    return cable_ != nullptr;
  }
  static Args At(const std::string& address, const std::string& interface, Args flags) {
    for (const std::string& flag :
         {"--listen=tcp://" + address + ":0", std::string("--insecure"),
          std::string("--run_dir=/run/kvrelay"), "--data_interface=" + interface,
          std::string("--trusted_data_network")}) {
      flags.push_back(flag);
    }
    return flags;
  }

  std::unique_ptr<IsolatedHost> here_;
  std::unique_ptr<IsolatedHost> there_;
  std::unique_ptr<Cable> cable_;
};

}  // namespace kvrelay::integration
