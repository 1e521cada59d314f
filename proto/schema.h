// The wire form of every message, one line per field: its name, where it is in the struct, and its
// limit. Encode and Decode are generated from it. Fields are written in this order and read in any.
//
// To add a field: a line here, a member in messages.h. Peers of an older version do not send it, so
// a field added after 1.0 needs a default there (see PROTOCOL.md, versions).
#pragma once

#include <cstdint>
#include <limits>
#include <string>
#include <string_view>
#include <tuple>
#include <type_traits>
#include <vector>

#include "proto/limits.h"
#include "proto/messages.h"

namespace kvrelay::proto {

template <typename S, typename M>
struct Field {
  std::string_view name;
  M S::*member;
  uint64_t max;      // numbers: the largest; strings: bytes; arrays: elements, of block tables all
                     // blocks together; the rest: not used
  uint64_t min = 0;  // strings only
  bool opaque = false;  // a string that is not text: msgpack bin
};

// Ids, booleans, enums, doubles, structs, and numbers whose whole range is good.
template <typename S, typename M>
constexpr Field<S, M> Any(std::string_view name, M S::*member) {
  return {name, member, std::numeric_limits<uint64_t>::max()};
}
template <typename S, typename M>
requires std::is_unsigned_v<M>
constexpr Field<S, M> Number(std::string_view name, M S::*member, uint64_t max) {
  return {name, member, max};
}
template <typename S>
constexpr Field<S, std::string> Text(std::string_view name, std::string S::*member, uint64_t max) {
  return {name, member, max};
}
template <typename S>
constexpr Field<S, std::string> Bytes(std::string_view name, std::string S::*member, uint64_t min,
                                      uint64_t max) {
  return {name, member, max, min, true};
}
template <typename S, typename E>
constexpr Field<S, std::vector<E>> List(std::string_view name, std::vector<E> S::*member,
                                        uint64_t max) {
  return {name, member, max};
}

// kName (as in error messages) and kFields of each struct. No primary definition: other types are
// not messages.
template <typename T>
struct Schema;

// --- Parts from kvcache --------------------------------------------------------------------------

template <>
struct Schema<KvKind> {
  static constexpr std::string_view kName = "LAYER_KIND";
  static constexpr auto kFields =
      std::tuple{Number("head_group", &KvKind::head_group, kMaxKinds),
                 Number("window", &KvKind::window, kMaxTokens),
                 Number("block_size", &KvKind::block_size, kMaxBlockSize),
                 Any("num_blocks", &KvKind::num_blocks),
                 Number("kv_heads", &KvKind::kv_heads, kMaxHeads),
                 Number("head_dim", &KvKind::head_dim, kMaxHeadDim),
                 Any("block_stride", &KvKind::block_stride),
                 Any("head_stride", &KvKind::head_stride),
                 Any("token_stride", &KvKind::token_stride),
                 Any("page_bytes", &KvKind::page_bytes)};
};
template <>
struct Schema<KvScales> {
  static constexpr std::string_view kName = "SCALES";
  static constexpr auto kFields =
      std::tuple{Any("per_head", &KvScales::per_head), List("k", &KvScales::k, kMaxScales),
                 List("v", &KvScales::v, kMaxScales), Any("with_request", &KvScales::with_request)};
};
template <>
struct Schema<KvLayout> {
  static constexpr std::string_view kName = "LAYOUT";
  static constexpr auto kFields =
      std::tuple{Any("dtype", &KvLayout::dtype),
                 Any("format", &KvLayout::format),
                 Number("block_size", &KvLayout::block_size, kMaxBlockSize),
                 Any("num_blocks", &KvLayout::num_blocks),
                 Number("kv_heads", &KvLayout::kv_heads, kMaxHeads),
                 Number("head_dim", &KvLayout::head_dim, kMaxHeadDim),
                 Any("block_stride", &KvLayout::block_stride),
                 Any("head_stride", &KvLayout::head_stride),
                 Any("token_stride", &KvLayout::token_stride),
                 List("k", &KvLayout::k, kMaxLayers),
                 List("v", &KvLayout::v, kMaxLayers),
                 Number("window", &KvLayout::window, kMaxTokens),
                 Any("page_bytes", &KvLayout::page_bytes),
                 Text("page_name", &KvLayout::page_name, kMaxName),
                 List("more_kinds", &KvLayout::more_kinds, kMaxKinds),
                 List("layer_kinds", &KvLayout::layer_kinds, kMaxLayers),
                 Any("scales", &KvLayout::scales)};
};
template <>
struct Schema<KvHeads> {
  static constexpr std::string_view kName = "HEADS";
  static constexpr auto kFields = std::tuple{Number("total", &KvHeads::total, kMaxHeads),
                                             Number("begin", &KvHeads::begin, kMaxHeads),
                                             Number("count", &KvHeads::count, kMaxHeads)};
};
template <>
struct Schema<KvShard> {
  static constexpr std::string_view kName = "SHARD";
  static constexpr auto kFields =
      std::tuple{Number("tp_rank", &KvShard::tp_rank, kMaxRanks),
                 Number("tp_size", &KvShard::tp_size, kMaxRanks),
                 Number("total_layers", &KvShard::total_layers, kMaxLayers),
                 Number("layer_begin", &KvShard::layer_begin, kMaxLayers),
                 Number("layer_count", &KvShard::layer_count, kMaxLayers),
                 Number("total_heads", &KvShard::total_heads, kMaxHeads),
                 Number("head_begin", &KvShard::head_begin, kMaxHeads),
                 Number("head_count", &KvShard::head_count, kMaxHeads),
                 List("more_heads", &KvShard::more_heads, kMaxKinds)};
};
template <>
struct Schema<TokenRange> {
  static constexpr std::string_view kName = "TOKEN_RANGE";
  static constexpr auto kFields = std::tuple{Number("begin", &TokenRange::begin, kMaxTokens),
                                             Number("end", &TokenRange::end, kMaxTokens)};
};
template <>
struct Schema<StreamShape> {
  static constexpr std::string_view kName = "STREAM_SHAPE";
  static constexpr auto kFields =
      std::tuple{List("layers", &StreamShape::layers, kMaxLayers),
                 Number("head_group", &StreamShape::head_group, kMaxKinds),
                 Number("head_begin", &StreamShape::head_begin, kMaxHeads),
                 Number("head_end", &StreamShape::head_end, kMaxHeads),
                 Any("tokens", &StreamShape::tokens),
                 Number("segment_tokens", &StreamShape::segment_tokens, kMaxTokens),
                 Any("dtype", &StreamShape::dtype),
                 Number("head_dim", &StreamShape::head_dim, kMaxHeadDim),
                 Any("has_v", &StreamShape::has_v),
                 Number("page_tokens", &StreamShape::page_tokens, kMaxBlockSize),
                 Any("page_bytes", &StreamShape::page_bytes)};
};

// --- Errors and the handshake --------------------------------------------------------------------

template <>
struct Schema<Error> {
  static constexpr std::string_view kName = "ERROR";
  static constexpr auto kFields =
      std::tuple{Any("code", &Error::code), Text("message", &Error::message, kMaxErrorText)};
};
template <>
struct Schema<GetMeta> {
  static constexpr std::string_view kName = "GET_META";
  static constexpr auto kFields =
      std::tuple{Any("engine", &GetMeta::engine), Any("incarnation", &GetMeta::incarnation),
                 Number("rank", &GetMeta::rank, kMaxRanks), Any("model", &GetMeta::model)};
};
template <>
struct Schema<TransportAddress> {
  static constexpr std::string_view kName = "TRANSPORT_ADDRESS";
  static constexpr auto kFields =
      std::tuple{Text("transport", &TransportAddress::transport, kMaxName),
                 Bytes("address", &TransportAddress::address, 0, kMaxAddress)};
};
template <>
struct Schema<RegionInfo> {
  static constexpr std::string_view kName = "REGION";
  static constexpr auto kFields =
      std::tuple{Any("bytes", &RegionInfo::bytes), Text("device", &RegionInfo::device, kMaxName),
                 Text("exported", &RegionInfo::exported, kMaxName)};
};
template <>
struct Schema<Meta> {
  static constexpr std::string_view kName = "META";
  static constexpr auto kFields =
      std::tuple{Any("engine", &Meta::engine),
                 Any("incarnation", &Meta::incarnation),
                 Number("rank", &Meta::rank, kMaxRanks),
                 Any("model", &Meta::model),
                 Text("model_name", &Meta::model_name, kMaxName),
                 Any("layout", &Meta::layout),
                 Any("shard", &Meta::shard),
                 List("regions", &Meta::regions, kMaxRegions),
                 Number("record_region", &Meta::record_region, kMaxRegions),
                 Any("record_slots", &Meta::record_slots),
                 Bytes("table_hash_key", &Meta::table_hash_key, 16, 16),
                 List("addresses", &Meta::addresses, kMaxTransports)};
};

// --- Leader and its ranks ------------------------------------------------------------------------

template <>
struct Schema<Hello> {
  static constexpr std::string_view kName = "HELLO";
  static constexpr auto kFields =
      std::tuple{Any("leader", &Hello::leader), Any("challenge", &Hello::challenge)};
};
template <>
struct Schema<HelloReply> {
  static constexpr std::string_view kName = "HELLO_REPLY";
  static constexpr auto kFields = std::tuple{Any("rank_incarnation", &HelloReply::rank_incarnation),
                                             Any("challenge", &HelloReply::challenge)};
};
template <>
struct Schema<Start> {
  static constexpr std::string_view kName = "START";
  static constexpr auto kFields = std::tuple{Any("leader", &Start::leader),
                                             Any("rank_incarnation", &Start::rank_incarnation),
                                             Any("lease", &Start::lease),
                                             List("tables", &Start::tables, kMaxBlocks),
                                             Number("first_token", &Start::first_token, kMaxTokens),
                                             Number("tokens", &Start::tokens, kMaxTokens),
                                             Any("prompt_hash", &Start::prompt_hash),
                                             Number("cap_ms", &Start::cap_ms, kMaxDurationMs)};
};
template <>
struct Schema<StartReply> {
  static constexpr std::string_view kName = "START_REPLY";
  static constexpr auto kFields =
      std::tuple{Any("slot", &StartReply::slot), Any("epoch", &StartReply::epoch)};
};
template <>
struct Schema<End> {
  static constexpr std::string_view kName = "END";
  static constexpr auto kFields =
      std::tuple{Any("leader", &End::leader), Any("lease", &End::lease)};
};
template <>
struct Schema<Empty> {
  static constexpr std::string_view kName = "EMPTY";
  static constexpr auto kFields = std::tuple<>{};
};

// --- Leases between engines ----------------------------------------------------------------------

template <>
struct Schema<TicketPart> {
  static constexpr std::string_view kName = "TICKET_PART";
  static constexpr auto kFields =
      std::tuple{Any("lease", &TicketPart::lease), Any("hash", &TicketPart::hash),
                 Number("first_token", &TicketPart::first_token, kMaxTokens),
                 Number("tokens", &TicketPart::tokens, kMaxTokens)};
};
template <>
struct Schema<Ticket> {
  static constexpr std::string_view kName = "TICKET";
  static constexpr auto kFields = std::tuple{Any("owner", &Ticket::owner),
                                             Any("incarnation", &Ticket::incarnation),
                                             Text("front", &Ticket::front, kMaxEndpoint),
                                             Any("model", &Ticket::model),
                                             Any("prompt", &Ticket::prompt),
                                             List("prefixes", &Ticket::prefixes, kMaxPrefixes)};
};
template <>
struct Schema<Claim> {
  static constexpr std::string_view kName = "CLAIM";
  static constexpr auto kFields = std::tuple{Any("reader", &Claim::reader),
                                             Any("reader_incarnation", &Claim::reader_incarnation),
                                             Any("owner_incarnation", &Claim::owner_incarnation),
                                             Any("lease", &Claim::lease),
                                             Any("hash", &Claim::hash),
                                             Number("tokens", &Claim::tokens, kMaxTokens),
                                             Any("model", &Claim::model)};
};
template <>
struct Schema<ClaimRank> {
  static constexpr std::string_view kName = "CLAIM_RANK";
  static constexpr auto kFields = std::tuple{Text("endpoint", &ClaimRank::endpoint, kMaxEndpoint),
                                             Number("rank", &ClaimRank::rank, kMaxRanks),
                                             Any("incarnation", &ClaimRank::incarnation),
                                             Any("slot", &ClaimRank::slot),
                                             Any("epoch", &ClaimRank::epoch),
                                             Any("shard", &ClaimRank::shard),
                                             Any("scales", &ClaimRank::scales)};
};
template <>
struct Schema<ClaimReply> {
  static constexpr std::string_view kName = "CLAIM_REPLY";
  static constexpr auto kFields =
      std::tuple{List("tables", &ClaimReply::tables, kMaxBlocks),
                 Number("first_token", &ClaimReply::first_token, kMaxTokens),
                 Number("tokens", &ClaimReply::tokens, kMaxTokens),
                 List("ranks", &ClaimReply::ranks, kMaxRanks),
                 Number("ttl_ms", &ClaimReply::ttl_ms, kMaxDurationMs)};
};
template <>
struct Schema<Release> {
  static constexpr std::string_view kName = "RELEASE";
  static constexpr auto kFields = std::tuple{
      Any("reader", &Release::reader), Any("reader_incarnation", &Release::reader_incarnation),
      List("leases", &Release::leases, kMaxLeases)};
};
template <>
struct Schema<Heartbeat> {
  static constexpr std::string_view kName = "HEARTBEAT";
  static constexpr auto kFields = std::tuple{
      Any("reader", &Heartbeat::reader), Any("reader_incarnation", &Heartbeat::reader_incarnation),
      List("leases", &Heartbeat::leases, kMaxLeases)};
};
template <>
struct Schema<HeartbeatReply> {
  static constexpr std::string_view kName = "HEARTBEAT_REPLY";
  static constexpr auto kFields = std::tuple{Any("incarnation", &HeartbeatReply::incarnation),
                                             List("ended", &HeartbeatReply::ended, kMaxLeases)};
};

// --- Data ----------------------------------------------------------------------------------------

template <>
struct Schema<PackedRead> {
  static constexpr std::string_view kName = "PACKED_READ";
  static constexpr auto kFields =
      std::tuple{Any("reader", &PackedRead::reader),
                 Any("reader_incarnation", &PackedRead::reader_incarnation),
                 Any("owner_incarnation", &PackedRead::owner_incarnation),
                 Any("lease", &PackedRead::lease),
                 Any("epoch", &PackedRead::epoch),
                 Any("shape", &PackedRead::shape),
                 Any("stream", &PackedRead::stream),
                 Number("chunk_bytes", &PackedRead::chunk_bytes, kMaxChunkBytes),
                 Text("transport", &PackedRead::transport, kMaxName),
                 Bytes("address", &PackedRead::address, 0, kMaxAddress),
                 Any("priority", &PackedRead::priority),
                 Number("timeout_ms", &PackedRead::timeout_ms, kMaxDurationMs)};
};
template <>
struct Schema<PackedCancel> {
  static constexpr std::string_view kName = "PACKED_CANCEL";
  static constexpr auto kFields =
      std::tuple{Any("reader", &PackedCancel::reader),
                 Any("reader_incarnation", &PackedCancel::reader_incarnation),
                 Any("stream", &PackedCancel::stream)};
};
template <>
struct Schema<Pull> {
  static constexpr std::string_view kName = "PULL";
  static constexpr auto kFields =
      std::tuple{Any("leader", &Pull::leader),
                 Any("number", &Pull::number),
                 Text("peer_front", &Pull::peer_front, kMaxEndpoint),
                 Any("owner", &Pull::owner),
                 Any("lease", &Pull::lease),
                 Any("hash", &Pull::hash),
                 Any("claim", &Pull::claim),
                 Any("tokens", &Pull::tokens),
                 List("own_tables", &Pull::own_tables, kMaxBlocks),
                 Any("priority", &Pull::priority),
                 Number("timeout_ms", &Pull::timeout_ms, kMaxDurationMs)};
};
template <>
struct Schema<PullReply> {
  static constexpr std::string_view kName = "PULL_REPLY";
  static constexpr auto kFields = std::tuple{Text("path", &PullReply::path, kMaxName),
                                             Any("bytes", &PullReply::bytes),
                                             Any("handshake_ms", &PullReply::handshake_ms),
                                             Any("copy_ms", &PullReply::copy_ms),
                                             Any("scales", &PullReply::scales),
                                             Any("cast", &PullReply::cast)};
};
template <>
struct Schema<Drop> {
  static constexpr std::string_view kName = "DROP";
  static constexpr auto kFields =
      std::tuple{Any("leader", &Drop::leader), Any("number", &Drop::number)};
};

// --- Looking at a process ------------------------------------------------------------------------

template <>
struct Schema<Describe> {
  static constexpr std::string_view kName = "DESCRIBE";
  static constexpr auto kFields = std::tuple<>{};
};
template <>
struct Schema<DescribeReply> {
  static constexpr std::string_view kName = "DESCRIBE_REPLY";
  static constexpr auto kFields = std::tuple{Text("json", &DescribeReply::json, kMaxText)};
};
template <>
struct Schema<PingReply> {
  static constexpr std::string_view kName = "PING_REPLY";
  static constexpr auto kFields =
      std::tuple{Any("engine", &PingReply::engine),
                 Any("incarnation", &PingReply::incarnation),
                 Text("version", &PingReply::version, kMaxName),
                 Any("model", &PingReply::model),
                 Text("model_text", &PingReply::model_text, kMaxErrorText),
                 Any("draining", &PingReply::draining)};
};
template <>
struct Schema<HealthReply> {
  static constexpr std::string_view kName = "HEALTH_REPLY";
  static constexpr auto kFields =
      std::tuple{Any("ready", &HealthReply::ready), Any("draining", &HealthReply::draining),
                 Text("role", &HealthReply::role, kMaxName),
                 Text("reason", &HealthReply::reason, kMaxErrorText)};
};

// --- Requests ------------------------------------------------------------------------------------

template <>
struct Schema<Reuse> {
  static constexpr std::string_view kName = "REUSE";
  static constexpr auto kFields =
      std::tuple{Any("ticket", &Reuse::ticket), Any("dtype", &Reuse::dtype),
                 Any("priority", &Reuse::priority)};
};
template <>
struct Schema<Prefill> {
  static constexpr std::string_view kName = "PREFILL";
  static constexpr auto kFields =
      std::tuple{Text("request_id", &Prefill::request_id, kMaxName),
                 List("system_ids", &Prefill::system_ids, kMaxTokens),
                 List("token_ids", &Prefill::token_ids, kMaxTokens),
                 Number("prefix_tokens", &Prefill::prefix_tokens, kMaxTokens),
                 Any("model", &Prefill::model),
                 List("reuse", &Prefill::reuse, kMaxReuse),
                 Number("timeout_ms", &Prefill::timeout_ms, kMaxDurationMs)};
};
template <>
struct Schema<PrefillReply> {
  static constexpr std::string_view kName = "PREFILL_REPLY";
  static constexpr auto kFields =
      std::tuple{Any("accepted", &PrefillReply::accepted),
                 Any("ticket", &PrefillReply::ticket),
                 Any("finished", &PrefillReply::finished),
                 Any("queue_ms", &PrefillReply::queue_ms),
                 Any("compute_ms", &PrefillReply::compute_ms),
                 Any("prefix_hit", &PrefillReply::prefix_hit),
                 Number("computed_tokens", &PrefillReply::computed_tokens, kMaxTokens),
                 Number("reused_tokens", &PrefillReply::reused_tokens, kMaxTokens),
                 Any("reuse_bytes", &PrefillReply::reuse_bytes),
                 Any("reuse_ms", &PrefillReply::reuse_ms)};
};
template <>
struct Schema<Generate> {
  static constexpr std::string_view kName = "GENERATE";
  static constexpr auto kFields =
      std::tuple{Text("request_id", &Generate::request_id, kMaxName),
                 List("system_ids", &Generate::system_ids, kMaxTokens),
                 List("token_ids", &Generate::token_ids, kMaxTokens),
                 Text("system_text", &Generate::system_text, kMaxText),
                 Text("prompt_text", &Generate::prompt_text, kMaxText),
                 Number("max_new_tokens", &Generate::max_new_tokens, kMaxTokens),
                 Any("temperature", &Generate::temperature),
                 Any("top_p", &Generate::top_p),
                 Any("seed", &Generate::seed),
                 Any("ignore_eos", &Generate::ignore_eos),
                 List("stop_ids", &Generate::stop_ids, kMaxStopIds),
                 Any("priority", &Generate::priority),
                 Number("timeout_ms", &Generate::timeout_ms, kMaxDurationMs)};
};
template <>
struct Schema<GenerateReply> {
  static constexpr std::string_view kName = "GENERATE_REPLY";
  static constexpr auto kFields =
      std::tuple{List("token_ids", &GenerateReply::token_ids, kMaxTokens),
                 Text("text", &GenerateReply::text, kMaxText),
                 Text("summary_json", &GenerateReply::summary_json, kMaxText)};
};
template <>
struct Schema<CancelRequest> {
  static constexpr std::string_view kName = "CANCEL";
  static constexpr auto kFields =
      std::tuple{Text("request_id", &CancelRequest::request_id, kMaxName)};
};

}  // namespace kvrelay::proto
