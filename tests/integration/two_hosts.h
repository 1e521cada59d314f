// Daemons on two hosts with a cable between them: far apart, and every byte that crosses is
// counted.
#pragma once

#include <memory>

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
    if (!here_ || !there_ || !there_->Join(*here_)) {
      GTEST_SKIP() << "no right to make namespaces here, or no ip or nsenter command";
    }
  }

  const IsolatedHost& here() const { return *here_; }
  const IsolatedHost& there() const { return *there_; }
  // Over the cable, on this side of it.
  uint64_t Arrived() const { return here_->ReceivedBytes("kvtest1"); }

  // Flags of a daemon on each, with a run folder that only its host sees.
  static Args Here(Args more = {}) { return At("10.213.7.2", "kvtest1", std::move(more)); }
  static Args There(Args more = {}) { return At("10.213.7.1", "kvtest0", std::move(more)); }

 private:
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
};

}  // namespace kvrelay::integration
