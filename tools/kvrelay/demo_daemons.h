// The two daemons of `kvrelay demo`: started beside this program, gone with this object.
#pragma once

#include <cstdint>
#include <nlohmann/json.hpp>
#include <optional>
#include <string>
#include <vector>

#include "base/status.h"
#include "tools/common/child_process.h"
#include "tools/common/stop_signals.h"

namespace kvrelay::tools {

// The model that ships with the project: below the source folder that we were built in, or beside
// an installed program.
Result<std::string> FindBundledModel();

struct DemoDaemon {
  std::string name;  // "prefill"
  std::string endpoint;
  uint32_t tp = 0;
  int64_t pid = 0;
  nlohmann::ordered_json ready;  // its first line
};

class DemoDaemons {
 public:
  struct Options {
    std::string model;
    std::string transport;
    std::string device;
    std::string kv_cache = "paged";
    uint32_t prefill_tp = 2;
    uint32_t decode_tp = 1;
  };

  // Returns when both take requests; kCancelled when a signal came first. A failure's message ends
  // with the daemon's last words.
  static Result<DemoDaemons> Start(const Options& options, const StopSignals& signals);
  DemoDaemons(DemoDaemons&&) = default;
  DemoDaemons& operator=(DemoDaemons&&) = delete;
  // Ends both (SIGTERM, then SIGKILL after 5 s) and removes their folder.
  ~DemoDaemons();

  const DemoDaemon& prefill() const { return prefill_; }
  const DemoDaemon& decode() const { return decode_; }

 private:
  DemoDaemons() = default;
  Result<DemoDaemon> StartOne(const std::string& name, uint32_t tp, std::vector<std::string> flags,
                              const StopSignals& signals);
  std::string LastWords(const std::string& name) const;

  std::string folder_;
  std::vector<ChildProcess> processes_;
  DemoDaemon prefill_;
  DemoDaemon decode_;
};

}  // namespace kvrelay::tools
