// Every message body as a plain struct. The wire form (msgpack maps with these field names) is
// codec.h's; who sends what and what may come back is PROTOCOL.md's. Durations are milliseconds on
// the receiver's clock.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "base/ids.h"
#include "base/priority.h"
#include "base/status.h"
#include "kvcache/layout.h"
#include "kvcache/lease_record.h"
#include "kvcache/shard.h"
#include "kvcache/stream_chunks.h"

namespace kvrelay::proto {

enum class Type : uint8_t {
  kError = 0,       // reply: Error
  kOk = 1,          // reply: the request's reply struct
  kGetMeta = 2,     // reader rank -> owner rank
  kHello = 3,       // leader -> its rank
  kStart = 4,       // leader -> its rank
  kEnd = 5,         // leader -> its rank
  kClaim = 6,       // reader leader -> owner leader
  kRelease = 7,     // reader leader -> owner leader
  kHeartbeat = 8,   // reader leader -> owner leader
  kPackedRead = 9,  // reader rank -> owner rank
  kPackedCancel = 10,
  kPull = 11,      // leader -> its rank
  kDrop = 12,      // leader -> its rank
  kDescribe = 13,  // anybody -> front; leader -> its rank
  kPing = 14,
  kHealth = 15,
  kPrefill = 16,     // decode leader -> prefill front; two replies: offered (more), finished
  kGenerate = 17,    // client -> decode front; one reply per token batch (more), then the last
  kCancel = 18,      // by request id
  kCancelCall = 19,  // caller -> callee: the call with this id is abandoned; no reply
};
std::string_view TypeName(Type type);  // "GET_META"
std::optional<Type> TypeFromName(std::string_view name);

struct Error {
  Code code = Code::kInternal;
  std::string message;
};

// --- Handshake -----------------------------------------------------------------------------------

struct GetMeta {
  EngineId engine;
  Incarnation incarnation = 0;
  uint32_t rank = 0;
  ContentHash model;
};

struct TransportAddress {
  std::string transport;  // "mapped", "ucx-packed", ...
  std::string address;    // opaque, may hold any byte
};

struct RegionInfo {
  uint64_t bytes = 0;
  std::string device;    // "cpu"
  std::string exported;  // "memfd"
};

struct Meta {
  EngineId engine;
  Incarnation incarnation = 0;  // of this rank's process
  uint32_t rank = 0;
  ContentHash model;
  std::string model_name;
  KvLayout layout;
  KvShard shard;
  std::vector<RegionInfo> regions;
  RegionId record_region = 0;  // lease records, 64 bytes each
  uint32_t record_slots = 0;
  std::string table_hash_key;  // 16 bytes: key of w3, per incarnation
  std::vector<TransportAddress> addresses;
};

// --- Leader and its ranks ------------------------------------------------------------------------

// In two steps: the first, with challenge 0, asks for one; the second carries it and makes the
// sender the rank's leader. A HELLO of a leader that died can arrive late, but it never carries the
// rank's newest challenge.
struct Hello {
  Incarnation leader = 0;
  uint64_t challenge = 0;
};
struct HelloReply {
  Incarnation rank_incarnation = 0;
  uint64_t challenge = 0;  // to the first step; 0: accepted
};

struct Start {
  Incarnation leader = 0;
  Incarnation rank_incarnation = 0;
  LeaseId lease;
  std::vector<KvTable> tables;  // by kind of layers; kinds behind them use the first
  uint32_t first_token = 0;     // maybe inside a block
  uint32_t tokens = 0;          // positions [first_token, first_token + tokens)
  ContentHash prompt_hash;
  uint32_t cap_ms = 0;  // the rank ends the lease itself after this
};
struct StartReply {
  uint32_t slot = 0;
  uint64_t epoch = 0;
};

struct End {
  Incarnation leader = 0;
  LeaseId lease;
};
struct Empty {};

// --- Leases between engines ----------------------------------------------------------------------

// A capability that travels with the request through anybody's router. No block ids, no addresses
// of memory.
struct TicketPart {
  LeaseId lease;
  ContentHash hash;  // prompt hash (suffix) or prefix hash
  uint32_t first_token = 0;
  uint32_t tokens = 0;
};
struct Ticket {
  EngineId owner;
  Incarnation incarnation = 0;  // of the owner's leader
  std::string front;            // endpoint; a hint, not an order
  ContentHash model;
  TicketPart prompt;
  std::vector<TicketPart> prefixes;  // each with its own lease
};

struct Claim {
  EngineId reader;
  Incarnation reader_incarnation = 0;
  Incarnation owner_incarnation = 0;  // from the ticket
  LeaseId lease;
  ContentHash hash;  // from the ticket part; a ticket of another prompt is refused by it
  uint32_t tokens = 0;
  ContentHash model;
};
struct ClaimRank {
  std::string endpoint;
  uint32_t rank = 0;
  Incarnation incarnation = 0;
  uint32_t slot = 0;
  uint64_t epoch = 0;
  KvShard shard;
  KvScales scales;  // the request's on this rank; none where the cache's own hold
};
struct ClaimReply {
  std::vector<KvTable> tables;  // as in Start; the same on all ranks
  uint32_t first_token = 0;
  uint32_t tokens = 0;
  std::vector<ClaimRank> ranks;
  uint32_t ttl_ms = 0;  // heartbeat at least three times in it
};

struct Release {
  EngineId reader;
  Incarnation reader_incarnation = 0;
  std::vector<LeaseId> leases;
};

struct Heartbeat {
  EngineId reader;
  Incarnation reader_incarnation = 0;
  std::vector<LeaseId> leases;  // claims that it still wants
};
struct HeartbeatReply {
  Incarnation incarnation = 0;  // of the owner's leader now
  std::vector<LeaseId> ended;   // of those named
};

// --- Data ----------------------------------------------------------------------------------------

struct PackedRead {
  EngineId reader;
  Incarnation reader_incarnation = 0;  // of the reader's rank
  Incarnation owner_incarnation = 0;   // of the owner's rank
  LeaseId lease;
  uint64_t epoch = 0;
  StreamShape shape;
  uint64_t stream = 0;
  uint64_t chunk_bytes = 0;
  std::string transport;
  std::string address;  // the reader's transport address
  Priority priority = Priority::kDecode;
  uint32_t timeout_ms = 0;
};

struct PackedCancel {
  EngineId reader;
  Incarnation reader_incarnation = 0;
  uint64_t stream = 0;
};

// One lease's tokens into our own blocks, on one rank.
struct Pull {
  Incarnation leader = 0;
  uint64_t number = 0;     // never reused by this leader incarnation
  std::string peer_front;  // for messages
  EngineId owner;
  LeaseId lease;
  ContentHash hash;
  ClaimReply claim;
  TokenRange tokens;
  std::vector<KvTable> own_tables;
  Priority priority = Priority::kDecode;
  uint32_t timeout_ms = 0;
};
struct PullReply {
  std::string path;  // "mapped"; "mixed" never happens inside one rank and peer
  uint64_t bytes = 0;
  double handshake_ms = 0;
  double copy_ms = 0;
  KvScales scales;  // that came with the request, for this rank's numbers; none where its own hold
  bool cast = false;  // not the owner's numbers: converted on the way, for another dtype or scale
};
// The rank gives up its destination for `number` and answers when nothing can write it any more.
struct Drop {
  Incarnation leader = 0;
  uint64_t number = 0;
};

// --- Looking at a process ------------------------------------------------------------------------

struct Describe {};
struct DescribeReply {
  std::string json;  // "schema":1; what `inspect` prints
};
struct PingReply {
  EngineId engine;
  Incarnation incarnation = 0;
  std::string version;
  ContentHash model;
  std::string model_text;  // "bard-4m: 6 layers x 4 KV heads x 32", for messages
  bool draining = false;
};
struct HealthReply {
  bool ready = false;
  bool draining = false;
  std::string role;
  std::string reason;
};

// --- Requests ------------------------------------------------------------------------------------

// KV that the decode engine still has of the prompt's first tokens, from an earlier turn of the
// conversation. The worker may take it and need not.
struct Reuse {
  Ticket ticket;  // prompt: tokens [0, n); no prefixes
  DType dtype{};  // of the values, all along
  Priority priority = Priority::kDecode;
};
struct Prefill {
  std::string request_id;
  std::vector<uint32_t> system_ids;
  std::vector<uint32_t> token_ids;
  uint32_t prefix_tokens = 0;  // of the system ids: on a lease of their own, the ticket's prefix
  ContentHash model;
  std::vector<Reuse> reuse{};  // at most one
  uint32_t timeout_ms = 0;
};
// First reply (more): accepted, at once. Second (more): admitted, with the ticket. Third: the KV of
// every token is published.
struct PrefillReply {
  bool accepted = false;  // first reply only
  Ticket ticket;          // second reply only
  bool finished = false;
  double queue_ms = 0;
  double compute_ms = 0;
  bool prefix_hit = false;
  uint32_t computed_tokens = 0;  // in compute_ms
  uint32_t reused_tokens = 0;    // taken from the decode engine: bytes, and how long that took
  uint64_t reuse_bytes = 0;
  double reuse_ms = 0;
};

struct Generate {
  std::string request_id;
  std::vector<uint32_t> system_ids;
  std::vector<uint32_t> token_ids;
  std::string system_text;  // used when the ids are empty and the model has a text codec
  std::string prompt_text;
  uint32_t max_new_tokens = 0;
  double temperature = 0;
  double top_p = 1;
  uint64_t seed = 0;
  bool ignore_eos = false;
  std::vector<uint32_t> stop_ids;
  Priority priority = Priority::kDecode;  // of its pull
  uint32_t timeout_ms = 0;
};
struct GenerateReply {
  std::vector<uint32_t> token_ids;  // new ones
  std::string text;                 // their bytes, complete UTF-8 sequences only
  std::string summary_json;         // last reply only: everything but ids and text (timing_ms, kv,
                                    // finish_reason, ...)
};
struct CancelRequest {
  std::string request_id;
};

}  // namespace kvrelay::proto
