// What kvrelayd was asked to be.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "base/ids.h"
#include "base/status.h"
#include "tools/common/endpoint.h"
#include "tools/common/engine_flags.h"
#include "tools/common/flags.h"
#include "tools/common/keys.h"
#include "transport/curve.h"

namespace kvrelay::tools {

struct DaemonOptions {
  std::string role;
  EngineFlags engine;

  std::string listen = "tcp://127.0.0.1:0";
  std::string advertise;    // empty: where we listen
  std::string prefill;      // decode: comma-separated endpoints
  std::string engine_id;    // 32 hex digits; empty: random
  uint32_t rank_ports = 0;  // rank r > 0 binds rank_ports + r - 1; 0: any
  bool insecure = false;
  KeyFlags keys;

  std::string transport = "auto";
  std::string host_id;  // empty: the kernel's boot id
  std::string data_interface;
  bool trusted_data_network = false;
  std::string run_dir;           // empty: DefaultRunDir()
  uint64_t max_bytes_per_s = 0;  // 0: no cap, as below
  uint64_t max_inflight_bytes = 0;
  uint64_t max_mapped_bytes = 0;
  uint32_t spin_us = 50;

  uint32_t lease_ttl_ms = 30'000;
  uint32_t pull_timeout_ms = 30'000;
  bool stream_pulls = true;
  bool reuse_from_decode = false;
  uint32_t conversation_blocks = 512;
  uint32_t conversation_ttl_ms = 300'000;
  uint32_t drain_timeout_ms = 10'000;
  std::string log_level = "info";

  // Declares every flag; this object must not move from here on.
  void Declare(FlagSet& flags);
  // Refuses what does not go together; sets the parsed fields below.
  Status Check();
  // Loopback, or said to be.
  bool DataNetworkIsTrusted() const;

  Endpoint listen_at;
  Endpoint advertise_at;  // port 0: the one that was bound
  std::vector<Endpoint> prefill_workers;
  EngineId id;
  std::shared_ptr<const transport::CurveIdentity> identity;  // null: no keys

 private:
  Status CheckUntrustedDataNetwork() const;
};

// $XDG_RUNTIME_DIR/kvrelay, else /tmp/kvrelay-UID.
std::string DefaultRunDir(const Environment& environment);

}  // namespace kvrelay::tools
