#include "proto/codec.h"

#include "proto/pack.h"
#include "proto/parse.h"
#include "proto/unpack.h"

namespace kvrelay::proto {

template <typename T>
std::string Encode(const T& message) {
  StringSink sink;
  Packer packer(sink);
  PackStruct(packer, message);
  return std::move(sink.bytes);
}

template <typename T>
Result<T> Decode(std::string_view bytes) {
  constexpr std::string_view kName = Schema<T>::kName;
  ParsedMap parsed;
  KVRELAY_RETURN_IF_ERROR(ParseMap(kName, bytes, kMaxBodyBytes, parsed));
  T message;
  if (Check bad = UnpackStruct(parsed.root, message)) {
    return ::kvrelay::Error(Code::kInvalidArgument,
                            std::string(kName) + ": field '" + bad->path + "' " + bad->what);
  }
  return message;
}

#define KVRELAY_MESSAGE(T)                  \
  template std::string Encode<T>(const T&); \
  template Result<T> Decode<T>(std::string_view);

KVRELAY_MESSAGE(Error)
KVRELAY_MESSAGE(GetMeta)
KVRELAY_MESSAGE(Meta)
KVRELAY_MESSAGE(Hello)
KVRELAY_MESSAGE(HelloReply)
KVRELAY_MESSAGE(Start)
KVRELAY_MESSAGE(StartReply)
KVRELAY_MESSAGE(End)
KVRELAY_MESSAGE(Empty)
KVRELAY_MESSAGE(Ticket)
KVRELAY_MESSAGE(Claim)
KVRELAY_MESSAGE(ClaimReply)
KVRELAY_MESSAGE(Release)
KVRELAY_MESSAGE(Heartbeat)
KVRELAY_MESSAGE(HeartbeatReply)
KVRELAY_MESSAGE(PackedRead)
KVRELAY_MESSAGE(PackedCancel)
KVRELAY_MESSAGE(Pull)
KVRELAY_MESSAGE(PullReply)
KVRELAY_MESSAGE(Drop)
KVRELAY_MESSAGE(Describe)
KVRELAY_MESSAGE(DescribeReply)
KVRELAY_MESSAGE(PingReply)
KVRELAY_MESSAGE(HealthReply)
KVRELAY_MESSAGE(Reuse)
KVRELAY_MESSAGE(Prefill)
KVRELAY_MESSAGE(PrefillReply)
KVRELAY_MESSAGE(Generate)
KVRELAY_MESSAGE(GenerateReply)
KVRELAY_MESSAGE(CancelRequest)
// Parts that also make sense alone (tests, tools).
KVRELAY_MESSAGE(TicketPart)
KVRELAY_MESSAGE(ClaimRank)
KVRELAY_MESSAGE(TransportAddress)
KVRELAY_MESSAGE(RegionInfo)
KVRELAY_MESSAGE(TokenRange)
KVRELAY_MESSAGE(KvKind)
KVRELAY_MESSAGE(KvScales)
KVRELAY_MESSAGE(KvLayout)
KVRELAY_MESSAGE(KvHeads)
KVRELAY_MESSAGE(KvShard)
KVRELAY_MESSAGE(StreamShape)

#undef KVRELAY_MESSAGE

}  // namespace kvrelay::proto
