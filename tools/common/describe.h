// What a daemon tells about itself: the JSON inside proto::DescribeReply, which `kvrelay inspect
// --json` prints as it is and `kvrelay inspect` as tables. One struct, both directions.
//
// Every key below is present in what a daemon writes, under the member's name; lists may be empty.
// Readers ignore keys that they do not know and take defaults for those that are absent, so that
// tools and daemons of different versions get along; a key of the wrong type is an error that names
// it. "schema":1 stands first. Ids are lower-case hex.
#pragma once

#include <cstdint>
#include <map>
#include <string>
#include <string_view>
#include <vector>

#include "base/status.h"

namespace kvrelay::tools {

struct Description {
  struct Engine {
    std::string engine_id;
    std::string incarnation;  // hex: 64 bits do not survive JavaScript
    std::string role;         // "prefill", "decode"
    std::string endpoint;
    std::string version;
    uint32_t protocol = 0;
    std::string model_fingerprint;
    std::string model_name;
    uint32_t tp = 0;
    uint32_t pp = 0;
    int64_t pid = 0;
    uint64_t uptime_ms = 0;
    bool ready = false;
    bool draining = false;
  };
  struct Flag {
    std::string name;
    std::string value;
    std::string source;  // "flag", "file F:LINE", "environment KVRELAY_X", "default"
  };
  struct Layout {
    std::string format;  // "nhd", "hnd", "mla"
    std::string dtype;
    uint32_t layers = 0;    // of rank 0
    uint32_t kv_heads = 0;  // of rank 0
    uint32_t head_dim = 0;
    uint32_t block_size = 0;
    uint32_t num_blocks = 0;
    uint64_t block_stride_bytes = 0;
    uint64_t head_stride_bytes = 0;
    uint64_t token_stride_bytes = 0;
  };
  struct Shard {
    uint32_t rank = 0;  // of the engine
    uint32_t tp = 0;
    uint32_t layer_begin = 0;
    uint32_t layer_end = 0;
    uint32_t total_layers = 0;
    uint32_t head_begin = 0;
    uint32_t head_end = 0;
    uint32_t total_heads = 0;
  };
  struct Region {
    uint32_t rank = 0;
    uint32_t id = 0;
    std::string device;  // "cpu"
    uint64_t bytes = 0;
    std::string exported;  // "memfd"; empty: not
  };
  struct Blocks {
    uint64_t total = 0;
    uint64_t used = 0;
    uint64_t free = 0;
    uint64_t quarantine = 0;
    uint64_t kept = 0;    // of the used ones, for conversations' next turns
    uint64_t shared = 0;  // of the used ones, of shared prefixes
  };
  struct Lease {
    std::string id;
    std::string epoch;  // hex, of rank 0
    std::string state;  // "offered", "claimed", "ending"
    std::string kind;   // "prompt", "prefix"
    uint64_t tokens = 0;
    uint64_t blocks = 0;
    uint64_t readers = 0;      // engines that claimed it
    int64_t time_left_ms = 0;  // until its TTL or cap, whichever is first
  };
  // One lease's tokens on their way into one rank.
  struct Session {
    uint32_t rank = 0;
    uint64_t number = 0;
    std::string state;
    std::string peer;  // "prefill tcp://127.0.0.1:7601 rank 0"
    uint64_t tokens = 0;
    uint64_t blocks = 0;
  };
  // Another engine's rank as one of ours reaches it.
  struct Peer {
    uint32_t own_rank = 0;
    std::string engine_id;
    std::string incarnation;
    uint32_t rank = 0;
    std::string endpoint;
    std::string state;  // "connecting", "ready"
    std::string path;   // "mapped", "ucx-packed"
    std::string why;    // why this path and none before it
    double rtt_ms = 0;  // last measured; 0: not yet
  };
  struct Prefix {
    std::string hash;
    uint64_t tokens = 0;
    uint64_t bytes = 0;
    uint64_t references = 0;
    uint64_t hits = 0;
  };
  struct PrefillWorker {
    std::string endpoint;
    std::string state;  // "unknown", "ready", "unreachable", "incompatible", "draining"
    std::string why;
    uint64_t outstanding_tokens = 0;
    uint64_t failures = 0;  // in a row
  };

  Engine engine;
  std::vector<Flag> flags;
  Layout layout;
  std::vector<Shard> shards;
  std::vector<std::string> transports;  // "mapped", "no ucx-packed: why", in order of preference
  std::vector<Region> regions;
  Blocks blocks;
  std::vector<Lease> leases;
  std::vector<Session> sessions;
  std::vector<Peer> peers;
  std::vector<Prefix> prefixes;
  std::vector<PrefillWorker> prefill_workers;
  // Prometheus' notation: "kvrelay_pulls_total{path=\"mapped\",outcome=\"ok\"}" -> 12.
  std::map<std::string, double> counters;
};

std::string DescriptionToJson(const Description& description);
// kInvalidArgument names the key.
Result<Description> DescriptionFromJson(std::string_view json);

}  // namespace kvrelay::tools
