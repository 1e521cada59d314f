#include "tests/proto/any_message.h"

#include <array>
#include <tuple>
#include <type_traits>
#include <utility>

#include "proto/codec.h"
#include "proto/schema.h"

namespace kvrelay::proto {
namespace {

// Whether an aggregate takes so many initialisers.
struct Anything {
  template <typename T>
  operator T() const;  // NOLINT(google-explicit-constructor): stands for any initialiser
};
template <typename T, size_t... kIndices>
constexpr bool Takes(std::index_sequence<kIndices...>) {
  return requires { T{(static_cast<void>(kIndices), Anything{})...}; };
}

template <typename T>
AnyMessage Row() {
  constexpr size_t kOnTheWire =
      std::tuple_size_v<std::remove_const_t<decltype(Schema<T>::kFields)>>;
  return {.name = Schema<T>::kName,
          .complete = Takes<T>(std::make_index_sequence<kOnTheWire>()) &&
                      !Takes<T>(std::make_index_sequence<kOnTheWire + 1>()),
          .initial = [] { return Encode(T{}); },
          .random = [](Random& random) { return Encode(RandomMessage<T>(random)); },
          .recode = [](std::string_view bytes) { return Decode<T>(bytes).map(&Encode<T>); }};
}

template <typename... Messages>
std::span<const AnyMessage> Table() {
  static const std::array<AnyMessage, sizeof...(Messages)> kTable = {Row<Messages>()...};
  return kTable;
}

}  // namespace

std::span<const AnyMessage> AllMessages() {
  return Table<Error, GetMeta, Meta, Hello, HelloReply, Start, StartReply, End, Empty, Ticket,
               Claim, ClaimReply, Release, Heartbeat, HeartbeatReply, PackedRead, PackedCancel,
               Pull, PullReply, Drop, Describe, DescribeReply, PingReply, HealthReply, Reuse,
               Prefill, PrefillReply, Generate, GenerateReply, CancelRequest, TicketPart, ClaimRank,
               TransportAddress, RegionInfo, TokenRange, KvKind, KvScales, KvLayout, KvHeads,
               KvShard, StreamShape>();
}

}  // namespace kvrelay::proto
